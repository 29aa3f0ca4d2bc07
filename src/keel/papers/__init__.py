"""The literature of the field: a catalogue, what each paper is in Keel, search, import, subscriptions and a feed."""
