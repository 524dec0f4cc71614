"""HTTP in front of sessions: an OpenAI-compatible server, with one thread that computes for each artifact."""
