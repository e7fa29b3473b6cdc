"""Settings, running attacks on defences, their records, and what they amount to."""
