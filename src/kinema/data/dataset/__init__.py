"""What a data set is: shards, their indexes, and the facts of every clip in columns."""
