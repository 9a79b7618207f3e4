"""A frontend's requests on their way through the engine, by what they lie in."""
