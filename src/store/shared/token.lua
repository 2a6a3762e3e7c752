-- Writes or removes the record of a token, unless another replica has issued one with a later end meanwhile: that end stays.
-- KEYS: tokens.  ARGV: field, then the new value, or nothing where the record is to go
local function read(text)
  local is_read, record = pcall(cjson.decode, text or '')
  if is_read and type(record) == 'table' and type(record.expiresAt) == 'number' and record.expiresAt < 1e15 then return record end
  return { expiresAt = 0 }
end
local stored, value = read(redis.call('HGET', KEYS[1], ARGV[1])), ARGV[2]
if not value then
  if stored.expiresAt <= redis.call('TIME')[1] * 1000 then redis.call('HDEL', KEYS[1], ARGV[1]) end
  return 1
end
local new = read(value)
if stored.expiresAt > new.expiresAt then
  -- Two users may be so named that they share an identity: of the other one nothing is known here.
  if stored.userId ~= new.userId then return 1 end
  value = value:gsub('"expiresAt":%-?%d+', ('"expiresAt":%.0f'):format(stored.expiresAt), 1)
end
redis.call('HSET', KEYS[1], ARGV[1], value)
return 1
