-- Makes wrk send one fixed request and print its figures as a line of JSON; times are microseconds.
--   wrk -t1 -cN -dTs -s wrk.lua http://HOST:PORT -- REQUEST_FILE
-- The request file holds a whole request, header and body: the same bytes that load.c sends.

function init(args)
  local file = assert(io.open(args[1], "rb"))
  local bytes = file:read("*a")
  file:close()
  -- wrk formats a request once and repeats it; a global `request` would instead call Lua for every request.
  wrk.format = function() return bytes end
end

function done(summary, latency, requests)
  local errors = summary.errors
  io.write(string.format(
    '\n{"duration_s": %.6f, "completed_count": %d, "non_200_count": %d, "connection_error_count": %d, ' ..
    '"unanswered_count": %d, "received_bytes": %d, "mean_us": %.2f, "min_us": %.2f, "max_us": %.2f, "p50_us": %.2f, ' ..
    '"p75_us": %.2f, "p90_us": %.2f, "p95_us": %.2f, "p99_us": %.2f, "p99_9_us": %.2f}\n',
    summary.duration / 1e6, summary.requests - errors.status, errors.status,
    errors.connect + errors.read + errors.write, errors.timeout, summary.bytes,
    latency.mean, latency.min, latency.max, latency:percentile(50), latency:percentile(75), latency:percentile(90),
    latency:percentile(95), latency:percentile(99), latency:percentile(99.9)))
end
