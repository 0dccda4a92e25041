"""The gate, keys, attestation, the bundle, and verification without torch. It makes no measurements of its own."""
