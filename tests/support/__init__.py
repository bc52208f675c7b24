"""What several tests need: servers, clients, clocks, processes. Nothing here is a test."""
