"""Scripts over a key that holds the token of whoever has a lease. Both answer 0 if not ours."""

from __future__ import annotations

from typing import Final

# KEYS: the lease. ARGV: our token, milliseconds from now.
RENEW: Final = """
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
return redis.call('PEXPIRE', KEYS[1], ARGV[2])
"""

# KEYS: the lease. ARGV: our token.
RELEASE: Final = """
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
return redis.call('DEL', KEYS[1])
"""
