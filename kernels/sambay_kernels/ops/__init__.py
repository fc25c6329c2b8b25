"""The ops, a folder each: `api` is what users call, `op` what torch sees, and the rest its forms by backend."""
