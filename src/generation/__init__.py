"""What generate, serve and demo share: requests in, lines of captions out."""
