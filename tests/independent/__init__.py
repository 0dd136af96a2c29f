"""Programs that others wrote verify what ours wrote: Go's checksum-database library, sigstore, securesystemslib."""
