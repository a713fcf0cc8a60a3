"""Pages and pictures of what runs left in their folders."""
