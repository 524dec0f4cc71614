// Which instruction set's kernels run on this processor.
#pragma once

#include "kernels.h"

namespace iceformer {

// The kernels chosen by `choose_instruction_set`, or before that the best that this processor has.
const Kernels& kernels();

// Whether the processor has what the kernels with AMX use, and the operating system grants this process its tiles, for
// which this asks.
bool amx_allowed();

}  // namespace iceformer

#pragma GCC visibility push(default)
extern "C" {
// Chooses an instruction set by name, or the best one for an empty name. Gives false, and changes nothing, if this
// build or this processor does not have it.
bool iceformer_choose_instruction_set(const char* name);

// The chosen one's name.
const char* iceformer_instruction_set();

// The names of those that this build and this processor have, best first, with blanks between.
const char* iceformer_instruction_sets();

// The version that setup.py gave: it changes with every change of the sources.
const char* iceformer_version();
}
#pragma GCC visibility pop
