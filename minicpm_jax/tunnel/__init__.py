"""Model wind tunnel: small runs that decide about large ones."""
