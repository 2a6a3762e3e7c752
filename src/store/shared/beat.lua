-- A node says that it works, and learns of all others.
-- KEYS: nodes, watcher, jobs, in.  ARGV: node, its entry, its watch or '', the message to trim before or '', nodes to remove...
-- A script that has removed something may go on when Redis is full.
redis.call('HDEL', KEYS[1], '', unpack(ARGV, 5))
redis.call('HSET', KEYS[1], ARGV[1], ARGV[2])
local time = redis.call('TIME')
local watch = redis.call('GET', KEYS[2]) or ''
-- Before any of them go: how many there were is what delegations have met.
local messages = redis.call('XLEN', KEYS[4])
-- Not behind what this server has never had: after a failover new messages may have lower ids.
if ARGV[4] ~= '' and ARGV[3] ~= '' and watch == ARGV[3] and #redis.call('XRANGE', KEYS[4], ARGV[4], ARGV[4]) > 0 then
  redis.call('XTRIM', KEYS[4], 'MINID', ARGV[4])
end
local answer = { time[1], time[2], watch, tostring(redis.call('HLEN', KEYS[3])), tostring(messages) }
for _, text in ipairs(redis.call('HGETALL', KEYS[1])) do answer[#answer + 1] = text end
return answer
