-- A message for all.
-- KEYS: in.  ARGV: most messages, kind, node, text
if redis.call('XLEN', KEYS[1]) >= tonumber(ARGV[1]) then return { '' } end
return { redis.call('XADD', KEYS[1], '*', ARGV[2], ARGV[3], 'value', ARGV[4]) }
