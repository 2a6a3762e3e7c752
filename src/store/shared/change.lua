-- Another watcher, where it is the expected one still: a claim, a gift, or an own entry that was lost.
-- KEYS: watcher, nodes.  ARGV: the watch that is expected or '', the watch that is wanted
redis.call('HDEL', KEYS[2], '')
local watch = redis.call('GET', KEYS[1]) or ''
-- What is no watch is written over: nobody could expect it.
local node, epoch = watch:match('^([0-9a-f]+) ([1-9][0-9]*)$')
if not node or #node ~= 16 or #epoch > 15 then watch = '' end
if watch == ARGV[1] then
  redis.call('SET', KEYS[1], ARGV[2])
  watch = ARGV[2]
end
return { watch }
