-- The watcher names users and homeservers that are at their bound, and itself.
-- KEYS: watcher, full.  ARGV: the own watch, names...
local watch = redis.call('GET', KEYS[1]) or ''
if watch ~= ARGV[1] then return { watch } end
local former = redis.call('HGETALL', KEYS[2])
for at = 1, #former, 2 do redis.call('HDEL', KEYS[2], former[at]) end
for at = 2, #ARGV do redis.call('HSET', KEYS[2], ARGV[at], '1') end
return { watch }
