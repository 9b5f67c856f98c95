"""Other people's diffusion objects, a file a library: how a Sampler is made from one, or takes the place of one.

The importers are called through the class methods of Sampler. They read the tables of the live object rather
than compute them, and refuse what the object does and a Sampler does not.
"""
