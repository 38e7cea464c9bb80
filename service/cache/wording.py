"""The closed lists of words that the guard of the look-up by meaning works with."""

from typing import Final


def words_of(text: str) -> frozenset[str]:
    """The words of a text, each once."""
    return frozenset(text.split())


INTERROGATIVES: Final = words_of("""
what which who whom whose when where why how is are am was were do does did has have had can could will
would shall should may might must
""")
"""A text that starts with one of these is a question, with its question mark or without."""

REQUESTS: Final = words_of("""
write draft give list suggest recommend summarize summarise translate describe explain define tell show
compare convert calculate compute generate create rewrite proofread fix help find name outline classify
extract correct
""")
"""Verbs of what is asked of the model itself; such a text needs no question mark, either."""

ACTIONS: Final = words_of("""
access activate add adjust adopt apply argue arrange assemble attach avoid back backup bake become block
boil book bleach brew brush build buy calculate calm cancel carve center change charge check choose clean
clear climb clone close collect combine compile compress compute concatenate configure connect convert cook
cool copy create crop cure customize cut debug declare decline decorate defrost delete deploy descale design
detect disable disconnect divide download draft draw drain dry dye earn edit email empty enable encrypt
decrypt export extend extract fill filter fix fold format freeze fry generate grate grill grind grow handle
hang hide hire host ignore implement import improve increase decrease reduce initialize insert install
integrate invest iron join keep knit learn list load lock lose lower maintain make manage measure melt merge
mix monitor mount move mute negotiate open order organize overcome pack paint park parse patch pay peel pick
plan plant play poach pickle prepare prevent print propagate prove prune publish pull push quit raise reach
read recover recycle refactor register reheat remove rename renew rent repair replace replant report repot
request reset resize restart restore return reverse revert roast roll rotate run save schedule scan search
secure sell send serve set setup sew sharpen shorten shrink sign simplify skip soften solve sort speed split
start stop store stretch style submit subscribe unsubscribe swap switch sync take teach test tie track train
translate transfer treat trim troubleshoot tune turn undo uninstall unlock unmute update upgrade upload use
validate verify visualize wash water weld whisk withdraw wrap write
""") | {"get rid of", "get started with", "find out", "find the", "find a", "find all"}
"""Verbs of what somebody can do. "How do I" and "How can I" ask the same before these; before others they do
not: "How do I look?" is not "How can I look?"."""

FUNCTION_WORDS: Final = (
    words_of("""
a an the this that these those some any all both each every either neither no none other another such i me
my mine myself you your yours yourself he him his himself she her hers herself it its itself we us our ours
they them their theirs one someone somebody anyone anybody everyone everybody nobody something anything
everything nothing people here there let and or but nor so if unless because while although than as then not
never only even just also too very about above across after against along among around at before behind
below beneath beside between beyond by down during except for from in inside into near of off on onto out
outside over past per since through throughout to toward towards under until up upon via with within without
be been being am is are was were do does did done has have had can cannot could will would shall should may
might must need ought
""")
    | INTERROGATIVES
)
"""Words that say how the others belong together; no name and no term is one of them."""

FIRST_WORDS: Final = FUNCTION_WORDS | REQUESTS | ACTIONS | words_of("hi hello hey please kindly thanks")
"""Words that lose their capital letter at the start of a text: none of them is a name there."""

ENGLISH: Final = words_of("""
what which who whom whose when where why how what's who's where's how's the this these those my your his
their our you she they it's i'm i'd i've you're are does did doesn't don't didn't isn't aren't has can't
cannot could would should must might and but because about above across after against before behind between
during except from into through under until with without and than then it not if every much many people good
best please kindly write give explain describe suggest recommend summarize summarise translate define tell
show compare create generate calculate draft proofread
""")
"""Common words that are English and no other language's."""

FOREIGN: Final = words_of("""
der das und ist nicht wie wer wo warum kann ein eine einen einem mit für auf den dem sie ich du wir ihr sind
mir mich dir dich zu von bei sich auch le la les est et une des que qui quel quelle quels quelles comment
pourquoi je ne pas dans pour du où ce cette il elle nous vous au aux sont mon ma mes ton ta el los las es y
qué cómo por para cuál dónde cuándo del está son mi mis tu tus un unos su sus lo se más muy gli è perché
quale dove chi di della dei sono per uno nel con os um uma como qual onde quem não da das dos na nos em eu
você meu minha ao de het een en niet wat hoe waarom wie van voor ik je mijn zijn och att det som inte hur
vad är jag av på til ikke hva hvordan er og jeg nie jest co jak gdzie kto czy się w z na bir bu ne mu nedir
kaç ve için
""")
"""Common words of other languages in the Latin script."""

LANGUAGE_WORDS: Final = words_of("""
translate translation spell spelling spelled pronounce pronounced pronunciation word words phrase phrases
sentence sentences letter letters syllable syllables rhyme rhymes grammar typo typos proofread rewrite
paraphrase correct conjugate contraction punctuation capitalize capitalise say said says mean means meaning
synonym synonyms antonym antonyms plural singular quote quotes regex command function variable keyword
operator string strings case apostrophe british american americans britons dialect hyphen hyphens hyphenated
written origin etymology uppercase lowercase count tokenize tokens token characters repeat echo abbreviate
""")
"""Where one of these stands, single letters of the other words may be what is asked about."""

LANGUAGES: Final = words_of("""
arabic bulgarian chinese croatian czech danish dutch english estonian finnish french german greek hebrew
hindi hungarian italian japanese korean latin norwegian persian polish portuguese romanian russian spanish
swedish thai turkish ukrainian urdu vietnamese afrikaans albanian basque bengali cantonese catalan esperanto
farsi gaelic icelandic indonesian irish klingon latvian lithuanian malay mandarin nepali punjabi sanskrit
serbian slovak slovenian swahili tagalog tamil telugu welsh yiddish zulu
""")

CASELESS: Final = words_of("""
api apis http https html css sql json xml yaml csv pdf url urls uri tcp udp dns cpu gpu usb vpn ssh ssl tls
gdp faq nasa nato ceo cto cfo dna rna hiv html5 aws gcp sdk ide uk eu usa tv ai crud ascii utf oauth graphql
afghanistan albania algeria argentina armenia australia austria bangladesh belgium bolivia brazil britain
bulgaria cambodia cameroon canada chile colombia croatia cuba cyprus denmark ecuador egypt england estonia
ethiopia finland france germany ghana greece hungary iceland india indonesia iran iraq ireland israel italy
jamaica japan kenya korea latvia lebanon lithuania luxembourg malaysia malta mexico morocco nepal
netherlands nigeria norway pakistan panama paraguay peru philippines poland portugal romania russia scotland
senegal singapore slovakia slovenia somalia spain sudan sweden switzerland syria taiwan tanzania thailand
tunisia uganda ukraine uruguay venezuela vietnam wales zambia africa america asia europe antarctica
amsterdam athens barcelona berlin boston brussels budapest cairo chicago copenhagen dublin edinburgh geneva
hamburg helsinki istanbul jakarta lisbon london madrid manila melbourne milan moscow mumbai munich oslo
paris prague reykjavik rome seoul shanghai stockholm sydney tokyo toronto venice vienna warsaw zurich monday
tuesday wednesday thursday friday saturday sunday january february april june july september october
november december javascript typescript kotlin postgresql mysql sqlite mongodb redis kubernetes linux debian
macos ios iphone ipad github gitlab django fastapi numpy pytorch tensorflow pytest nginx grafana prometheus
opentelemetry youtube linkedin paypal whatsapp chatgpt openai powerpoint
""") | (LANGUAGES - {"polish"})
"""Names that mean the same with a capital letter and without: not Turkey, China, May, Rust and WHO."""

PROGRAMMING_LANGUAGES: Final = words_of("""
python Python javascript JavaScript typescript TypeScript kotlin Kotlin css CSS html HTML sql SQL Java Go
Rust Ruby PHP
""")

RELATIONS: Final = frozenset({
    "capital", "population", "currency", "gdp", "GDP", "national anthem", "official language", "time zone",
    "boiling point", "melting point", "freezing point", "atomic number", "chemical symbol",
    "chemical formula",
    "ceo", "prime minister", "president", "purpose",
})  # fmt: skip
"""What a country, a substance or a company has one of, so that "X's" and "the … of X" are the same."""

KINDS: Final = words_of("""
country city river mountain ocean sea lake desert island continent planet animal bird fish language currency
year month day century company team university color
""")
"""Things that are asked for with "which" and with "what" alike."""

SUPERLATIVES: Final = words_of("""
largest biggest smallest tallest highest lowest longest shortest deepest oldest youngest fastest slowest
hottest coldest wettest driest richest poorest
""")

MAKERS: Final = {
    "author": "wrote", "painter": "painted", "inventor": "invented", "composer": "composed",
    "discoverer": "discovered",
}  # fmt: skip
"""Who makes something, and what that one did."""

THINGS: Final = {
    thing: thing[:-1] + "ies" if thing.endswith("y") else thing + "s"
    for thing in (
        "black hole", "prime number", "microservice", "vaccine", "antibiotic", "refrigerator", "fridge",
        "solar panel",
        "heat pump", "wind turbine", "jet engine", "combustion engine", "battery", "transistor", "capacitor",
        "microwave", "microwave oven", "electric car", "neural network", "load balancer", "circuit breaker",
        "hash table", "linked list", "binary tree", "webhook", "firewall", "blockchain", "noun", "adverb",
        "earthquake", "comet", "dishwasher", "thermostat", "laser", "semiconductor",
    )
}  # fmt: skip
"""Things that are explained in the singular and in the plural alike. The plural of other words is something
else: glasses, customs, arms."""

SYSTEMS: Final = words_of("linux Linux ubuntu Ubuntu debian Debian fedora Fedora macos macOS Windows")
"""Operating systems: something is done in or on them."""

UNDEFINABLE: Final = FUNCTION_WORDS | words_of("life love existence death god")
"""What a question for the meaning of them asks is not what the word means."""

NUMBER_WORDS: Final = (
    "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
)  # fmt: skip
NUMBERS: Final = {word: str(number) for number, word in enumerate(NUMBER_WORDS, start=2)}
"""Numbers in words; "one" is also a pronoun."""


def _spellings() -> dict[str, str]:
    british = {
        "colour": "color", "favour": "favor", "flavour": "flavor", "behaviour": "behavior",
        "neighbour": "neighbor",
        "honour": "honor", "labour": "labor", "humour": "humor", "rumour": "rumor", "harbour": "harbor",
        "organise": "organize", "summarise": "summarize", "realise": "realize", "recognise": "recognize",
        "optimise": "optimize", "apologise": "apologize", "customise": "customize", "minimise": "minimize",
        "maximise": "maximize", "analyse": "analyze", "visualise": "visualize", "memorise": "memorize",
    }  # fmt: skip
    whole = {
        "favourite": "favorite", "favourites": "favorites", "centre": "center", "centres": "centers",
        "theatre": "theater", "theatres": "theaters", "grey": "gray", "mould": "mold", "tyre": "tire",
        "tyres": "tires", "aeroplane": "airplane", "aeroplanes": "airplanes", "jewellery": "jewelry",
        "pyjamas": "pajamas", "aluminium": "aluminum",
        "cancelling": "canceling", "travelling": "traveling", "modelling": "modeling",
        "labelling": "labeling",
        "postgres": "postgresql", "Postgres": "postgresql", "whilst": "while", "amongst": "among",
    }  # fmt: skip
    for word, american in british.items():
        for ending in ("", "s", "d") if word.endswith("se") else ("", "s", "ed", "ing"):
            whole[word + ending] = american + ending
        if word.endswith("se"):
            whole[word[:-1] + "ing"] = american[:-1] + "ing"
    return whole


SPELLINGS: Final = _spellings()
"""Spellings of one word, by the one that stands for it."""
