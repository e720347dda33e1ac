"""The runner's part inside mitmproxy: who speaks, what the policy says, secrets, and one log line an exchange."""
