"""What tests of stored scores share."""


def write(store, key, scores):
    """An entry of one shard, made unless it is there; its folder."""
    with store.writing(key, len(scores), tokens_per_batch=4096) as draft:
        if draft.missing:
            draft.put(0, scores)
        draft.finish()
    return store.path(key)
