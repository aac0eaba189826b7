"""FlashMask's call and its paper's twelve masks -> ours."""
