"""Real models for tests and benchmarks, built from registry packages into models/out/."""
