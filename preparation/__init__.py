"""The machinery behind data_utils: pieces, ids, shuffle, the work folder that processes share."""
