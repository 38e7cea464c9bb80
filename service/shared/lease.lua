-- A lease on one call, or the answer that its owner has left there for those who wait.
--
-- KEYS  the call's key
-- ARGV  what: take: the lease, unless there is a lease or an answer already
--             put: another value, if the lease is the caller's own
--       own: the value of the caller's lease
--       value: what is put; nothing removes the lease
--       kept: milliseconds after which the key is removed
-- Returns what is there, or nothing where the caller has taken the lease, or has put the value.

local kind = redis.call('TYPE', KEYS[1]).ok
local found = kind == 'string' and redis.call('GET', KEYS[1]) or (kind ~= 'none' and kind)
if ARGV[1] == 'take' then
  if found then
    return found
  end
  redis.call('SET', KEYS[1], ARGV[2], 'PX', ARGV[4])
elseif found ~= ARGV[2] then
  return found or 'none'
elseif ARGV[3] == '' then
  redis.call('DEL', KEYS[1])
else
  redis.call('SET', KEYS[1], ARGV[3], 'PX', ARGV[4])
end
return ''
