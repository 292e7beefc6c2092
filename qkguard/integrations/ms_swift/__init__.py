"""ms-swift's plugin file alone: ms-swift puts the folder of a plugin file on sys.path, where others would shadow."""
