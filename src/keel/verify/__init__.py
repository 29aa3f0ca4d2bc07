"""Methods held to their stated objectives, on worlds where the exact answer is known."""
