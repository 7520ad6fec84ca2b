"""Frozen segmentation: does the encoder know what lies where after training?"""
