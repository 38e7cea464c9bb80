-- Counts one call against all limits that apply to it, in one step that no other client can interrupt.
--
-- KEYS  for each limit its key; all have one hash tag, so that a cluster keeps them together
-- ARGV  for each limit four values:
--         how     together: counted if every limit that is counted together has room
--                 alone: counted if this limit has room
--                 look: not counted
--         amount  events allowed in a period
--         period  in microseconds
--         exact   1: a list of the moments of the events; 0: two counters, of this period and the one before
-- Returns 1 or 0, for whether those counted together had room, and then for each limit the events that are left
-- and the microseconds until the next one comes free. service/utils/rates.py counts the same way in memory.

local time = redis.call('TIME')
local now = time[1] * 1000000 + time[2]

local function open_exact(limit)
  local oldest = tonumber(redis.call('LINDEX', limit.key, 0) or nil)
  -- An event that is more than a period ahead is from before the server's clock was set back.
  while oldest and (oldest <= now - limit.period or oldest > now + limit.period) do
    redis.call('LPOP', limit.key)
    oldest = tonumber(redis.call('LINDEX', limit.key, 0) or nil)
  end
  limit.oldest = oldest or now
  limit.used = redis.call('LLEN', limit.key)
end

local function open_counters(limit)
  local kept = redis.call('HMGET', limit.key, 'period', 'current', 'previous')
  local into = math.fmod(now, limit.period)
  limit.number = (now - into) / limit.period
  limit.left = limit.period - into
  limit.current, limit.previous = tonumber(kept[2] or 0), tonumber(kept[3] or 0)
  local counted = tonumber(kept[1] or limit.number)
  if counted ~= limit.number then
    limit.previous = counted == limit.number - 1 and limit.current or 0
    limit.current = 0
  end
end

local function used(limit)
  if limit.exact then
    return limit.used
  end
  return math.floor(limit.previous * limit.left / limit.period + limit.current)
end

local function add(limit)
  local kept_us = limit.period
  if limit.exact then
    redis.call('RPUSH', limit.key, string.format('%.0f', now))
    limit.used = limit.used + 1
  else
    limit.current = limit.current + 1
    redis.call('HSET', limit.key, 'period', string.format('%.0f', limit.number),
      'current', limit.current, 'previous', limit.previous)
    kept_us = limit.left + limit.period
  end
  redis.call('PEXPIRE', limit.key, string.format('%.0f', math.ceil(kept_us / 1000)))
end

local function microseconds_until_next(limit)
  if limit.exact then
    return math.min(math.max(limit.oldest + limit.period - now, 0), limit.period)
  end
  local left_s, period_s, wait_s = limit.left / 1000000, limit.period / 1000000, nil
  if limit.previous > 0 then
    wait_s = math.fmod(left_s, period_s / limit.previous)
  end
  if limit.current > 0 then
    wait_s = math.min(wait_s or period_s, math.fmod(left_s, period_s))
  end
  return math.ceil((wait_s or 0) * 1000000)
end

local limits, has_room = {}, 1
for i, key in ipairs(KEYS) do
  local at = 4 * (i - 1)
  local limit = {
    key = key,
    how = ARGV[at + 1],
    amount = tonumber(ARGV[at + 2]),
    period = tonumber(ARGV[at + 3]),
    exact = ARGV[at + 4] == '1',
  }
  if limit.exact then open_exact(limit) else open_counters(limit) end
  limit.has_room = used(limit) < limit.amount
  if limit.how == 'together' and not limit.has_room then
    has_room = 0
  end
  limits[i] = limit
end

local answer = {has_room}
for _, limit in ipairs(limits) do
  if (limit.how == 'together' and has_room == 1) or (limit.how == 'alone' and limit.has_room) then
    add(limit)
  end
  table.insert(answer, math.max(limit.amount - used(limit), 0))
  table.insert(answer, microseconds_until_next(limit))
end
return answer
