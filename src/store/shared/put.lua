-- The watcher writes records, removals first: a full Redis must be able to get emptier.
-- KEYS: watcher, jobs.  ARGV: the own watch, then 'd' field '' or 's' field value, again and again
local watch = redis.call('GET', KEYS[1]) or ''
if watch ~= ARGV[1] then return { watch } end
for at = 2, #ARGV, 3 do
  if ARGV[at] == 'd' then redis.call('HDEL', KEYS[2], ARGV[at + 1]) end
end
for at = 2, #ARGV, 3 do
  if ARGV[at] == 's' then redis.call('HSET', KEYS[2], ARGV[at + 1], ARGV[at + 2]) end
end
return { watch }
