"""From a trained folder to a name that anyone can load: checks, the tree that is published, its
card and manifest, the upload, and the proof that what arrived is what was sent.
"""
