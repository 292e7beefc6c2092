"""The restore methods: from a layer's rows before and after SFT to the rows to write.

May import `drift` and the rooms below it. Public: `registry.get_method`, `registry.check_options`,
`apply.restore_layer`.

A method gets `(spec, maps, pre, post, **options)`: the layer, its selected parameters, and for each parameter name the
compact tensors before SFT (in the dtype they were kept in) and after (in the checkpoint's dtype). It returns the new
compact tensors in any float dtype, rounded once when they are written, and what it did, for the manifest.
"""
