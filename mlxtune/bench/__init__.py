"""What training would take on a machine, and what it takes on this one."""
