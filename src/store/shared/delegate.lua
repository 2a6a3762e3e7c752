-- Anybody writes a record whose former value was read, and tells the watcher.
-- KEYS: jobs, in, full.  ARGV: field, the value that is expected or '', the value, most records, most messages, names that may be full...
local value = redis.call('HGET', KEYS[1], ARGV[1]) or ''
local time = redis.call('TIME')
if value ~= ARGV[2] and value ~= ARGV[3] then return { time[1], time[2], 'other', value } end
if value == '' then
  if redis.call('HLEN', KEYS[1]) >= tonumber(ARGV[4]) then return { time[1], time[2], 'full', '' } end
  for at = 6, #ARGV do
    if redis.call('HGET', KEYS[3], ARGV[at]) then return { time[1], time[2], 'full', ARGV[at] } end
  end
end
redis.call('HSET', KEYS[1], ARGV[1], ARGV[3])
local id = ''
if redis.call('XLEN', KEYS[2]) < tonumber(ARGV[5]) then
  id = redis.call('XADD', KEYS[2], '*', 'job', ARGV[1], 'value', ARGV[3])
end
return { time[1], time[2], 'done', id }
