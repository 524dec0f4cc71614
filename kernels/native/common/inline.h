// A function that is inlined always: a copy compiled for one instruction set could be the one that the linker keeps for
// all of them.
#pragma once

#define ICEFORMER_INLINE inline __attribute__((always_inline))
