"""Words that turn a question into another one while its vector hardly moves; one sense a name."""

from typing import Final


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


def _senses(text: str) -> dict[str, str]:
    """Each word after a colon, by the name before it."""
    lines = (line.split(":") for line in text.strip().splitlines())
    return {word: name for name, words in lines for word in words.split()}


NUMBERS: Final = _senses("""
0: zero
1: one first once
2: two second twice double
3: three third triple
4: four fourth
5: five fifth
6: six sixth
7: seven seventh
8: eight eighth
9: nine ninth
10: ten tenth
11: eleven
12: twelve dozen
13: thirteen
14: fourteen
15: fifteen
16: sixteen
17: seventeen
18: eighteen
19: nineteen
20: twenty
30: thirty
40: forty
50: fifty
60: sixty
70: seventy
80: eighty
90: ninety
100: hundred
1000: thousand
1e6: million
1e9: billion
0.5: half
0.25: quarter
""")

NEGATIONS: Final = frozenset(
    _words("""
no not never none nobody nothing nowhere neither nor without except excluding unless cannot hardly
avoid stop prevent lacks lacking minus false
""")
)

SENSES: Final = _senses("""
up: increase increases increased increasing raise raising rise grow growing gain boost up upwards
down: decrease decreases decreased decreasing reduce reducing lower lowering fall drop shrink cut down
more: more greater larger bigger higher most biggest largest highest maximum max maximize maximise longest
less: less fewer smaller least smallest lowest minimum min minimize minimise shortest shorter
better: better best advantage advantages benefit benefits pros strengths good positive
worse: worse worst disadvantage disadvantages drawback drawbacks cons weaknesses bad negative
before: before prior preceding earlier previous previously ago
after: after following later next afterwards subsequent since
start: start starts begin beginning launch open opening activate
end: end ends ending finish close closing terminate quit shutdown
on: enable enabled enabling allow allowed allowing permit on
off: disable disabled disabling deny block blocked forbid forbidden ban off
add: add adding insert append include including attach
remove: remove removing delete deleting erase exclude detach drop
install: install installing setup
uninstall: uninstall uninstalling
buy: buy buying purchase purchasing
sell: sell selling sale
send: send sending upload uploading export exporting give
receive: receive receiving download downloading import importing get
encode: encode encoding encrypt encryption compress compressing serialize lock
decode: decode decoding decrypt decryption decompress extract unzip deserialize unlock
push: push
pull: pull
merge: merge merging join combine
split: split splitting separate divide
multiply: multiply multiplied times product
read: read reading load
write: write writing save
asc: ascending oldest
desc: descending newest latest
left: left
right: right
north: north northern
south: south southern
east: east eastern
west: west western
hot: hot warm heat heating
cold: cold cool cooling freeze freezing
fast: fast faster fastest quick quickly speed
slow: slow slower slowest slowly
old: old older elderly
young: young younger
new: new
cheap: cheap cheaper cheapest affordable
expensive: expensive costly
long: long
short: short brief
hard: hard difficult
easy: easy simple
safe: safe safely
dangerous: dangerous unsafe risky harmful
same: same similar similarities similarity common alike
different: different difference differences differ differs distinct
cause: cause causes caused why reason reasons
effect: effect effects consequence consequences result results
cure: cure treat treatment treating
symptom: symptom symptoms sign signs
wet: wet humid moist
dry: dry
win: win wins winning won victory
lose: lose loses losing lost loss defeat
enter: enter entering arrive arrival arriving login
leave: leave leaving depart departure departing exit logout
import_: inbound incoming input
export_: outbound outgoing output
client: client customer
server: server
sync: sync synchronous
async: async asynchronous
public: public
private: private
vertical: vertical vertically column columns
horizontal: horizontal horizontally row rows
he: he him his man men male boy father son brother husband king uncle
she: she her hers woman women female girl mother daughter sister wife queen aunt
day: morning day daytime
night: evening night nighttime
lend: lend lending
borrow: borrow borrowing
employer: employer
employee: employee
teacher: teacher
student: student
landlord: landlord
tenant: tenant
debit: debit
credit: credit
asset: asset assets
liability: liability liabilities
acid: acid acidic
base: alkaline basic
inner: inside inner internal interior indoor indoors
outer: outside outer external exterior outdoor outdoors
front: front
back: back
top: top above over
bottom: bottom below under beneath
hypo: hypotension hypoglycemia hypothyroidism hypothermia
hyper: hypertension hyperglycemia hyperthyroidism hyperthermia
must: must required mandatory
should: should recommended
past: was were did had
future: will
singular: singular
plural: plural
summarize: summarize summarise summary shorten
expand: expand elaborate lengthen
""")
"""Each word's sense: questions whose senses differ are different questions."""

UNITS: Final = _senses("""
km: km kilometer kilometers kilometre kilometres
mile: mile miles mph
m: meter meters metre metres
cm: cm centimeter centimeters centimetre centimetres
mm: mm millimeter millimeters
inch: inch inches
ft: ft foot feet
yd: yard yards
kg: kg kilo kilos kilogram kilograms
g: g gram grams
mg: mg milligram milligrams
lb: lb lbs pound pounds
oz: oz ounce ounces
t: ton tons tonne tonnes
l: l liter liters litre litres
ml: ml milliliter milliliters
gal: gallon gallons
cup: cup cups
tbsp: tablespoon tablespoons tbsp
tsp: teaspoon teaspoons tsp
c: celsius centigrade
f: fahrenheit
k: kelvin
s: second seconds sec secs
ms: millisecond milliseconds ms
min: minute minutes mins
h: hour hours hr hrs hourly
d: days daily
wk: week weeks weekly
mo: month months monthly
yr: year years yearly annual annually
dec: decade decades
cent: century centuries
usd: dollar dollars usd
eur: euro euros eur
gbp: sterling gbp
yen: yen jpy
pct: percent percentage
byte: byte bytes
bit: bit bits
kb: kb kilobyte kilobytes
mb: mb megabyte megabytes
gb: gb gigabyte gigabytes
tb: tb terabyte terabytes
w: watt watts
kw: kw kilowatt kilowatts
v: volt volts
a: amp amps ampere amperes
hz: hertz hz
cal: calorie calories kcal
j: joule joules
acre: acre acres
ha: hectare hectares
row: sentence sentences
par: paragraph paragraphs
word: word words
bullet: bullet bullets
page: page pages
""")

DATES: Final = frozenset(
    _words("""
january february march april june july august september october november december monday tuesday
wednesday thursday friday saturday sunday today tomorrow yesterday tonight spring summer autumn
winter christmas easter weekend weekday noon midnight
""")
)

NAMES: Final = frozenset(
    _words("""
python java javascript typescript rust golang ruby php perl kotlin swift scala haskell sql mysql
postgres postgresql sqlite mongodb redis json xml yaml csv html css bash linux windows macos ubuntu
debian android ios docker kubernetes git github gitlab react angular vue django flask fastapi spring
excel english french german spanish italian portuguese dutch russian chinese japanese korean arabic
hindi france germany spain italy portugal netherlands russia china japan korea india brazil canada
mexico england britain scotland ireland sweden norway denmark finland poland greece turkey egypt
australia austria switzerland belgium america europe asia africa london paris berlin madrid rome
tokyo beijing moscow sydney boston chicago dublin vienna oslo lisbon athens cairo mercury venus
earth mars jupiter saturn uranus neptune pluto moon sun iron gold silver copper oxygen hydrogen
helium nitrogen carbon cat cats dog dogs horse horses cow cows chicken beef pork fish rice pasta
bread coffee tea wine beer milk water red blue green yellow black white orange purple heart liver
kidney kidneys lung lungs brain stomach
""")
)
"""Names that people write small."""

OPENERS: Final = frozenset(
    _words("""
a an the what whats what's which who whose whom when where why how is are was were do does did can
could should would will shall may might must has have had am please kindly tell give show explain
describe summarize summarise write list name define compare translate convert calculate compute find
create generate make help i i'm i'd im my we our you your it its this that these those there if in
on at for from to of with by and or but so let provide suggest recommend outline rewrite fix
implement sort add remove delete insert enable disable install uninstall use using state identify
discuss draft turn solve say count return open close start stop every each some any all no not never
don't doesn't isn't aren't won't can't hi hello hey thanks ok okay need want looking steps ways tips
reasons number time place way instructions guide difference distance cost price population capital
meaning definition someone somebody anyone mine best worst good bad increase decrease raise lower
before after buy buying sell selling send receive encrypt decrypt upload download work working
having getting
""")
)
"""Words that begin a sentence without being a name."""

_LANGUAGES: Final = """
de: der die das und ist nicht wie was ich wer wo warum kann ein eine mit für auf den
fr: le la les est et une des que qui quel quelle comment pourquoi je pas dans pour du
es: el la los las es y una que qué cómo por para cuál dónde del está quién un
it: il lo gli è e una che come perché quale dove chi di della sono per un
pt: o os as é e uma que como qual onde quem não para por do da um
nl: de het een en is niet wat hoe waarom waar wie van voor met ik
en: the is are what how why where who of to and in a an do does can for i my with
"""

LANGUAGES: Final = {
    name: frozenset(_words(words))
    for name, words in (line.split(":") for line in _LANGUAGES.strip().splitlines())
}
"""A few of each language's commonest words."""
