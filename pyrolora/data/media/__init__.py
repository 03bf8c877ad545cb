"""Pictures and sounds as people have them, alone and beside texts."""
