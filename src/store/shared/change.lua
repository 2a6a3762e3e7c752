-- Another watcher, where it is the expected one still: a claim, a gift, or an own entry that was lost.
-- KEYS: watcher, nodes.  ARGV: the watch that is expected or '', the watch that is wanted
redis.call('HDEL', KEYS[2], '')
local watch = redis.call('GET', KEYS[1]) or ''
if watch == ARGV[1] then
  redis.call('SET', KEYS[1], ARGV[2])
  watch = ARGV[2]
end
return { watch }
