"""Checkpoints on disk: conversion, storage, manifests, export and resharding."""
