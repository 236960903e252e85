"""Mask criteria, one per file or a family in one, each with a row in :data:`snows_hf.masks.criteria.CRITERIA`.

A criterion maps evidence (weights, network, images, labels) to scores of the weights' shapes; the highest stay.
"""
