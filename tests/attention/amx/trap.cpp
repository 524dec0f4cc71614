// Runs a library's real tile instructions on a processor that has none: each raises SIGILL, and the handler does its
// work on the emulated tile file. So the machine code itself is tested, which the emulated intrinsics leave out.

#include <signal.h>
#include <ucontext.h>

#include "amx_emulation.h"
#include "common/dispatch.h"

namespace iceformer {

// Stands in for amx.cpp: whatever the processor, its tile instructions are caught here.
bool amx_allowed() { return true; }

namespace {

using amx_emulation::require;

// The registers that an instruction's operands name, by their numbers in machine code.
greg_t register_value(const ucontext_t& context, int number) {
  static const int kOrder[] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                               REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};
  return context.uc_mcontext.gregs[kOrder[number]];
}

// One instruction with a three-byte VEX prefix: C4, [RXB mmmmm], [W vvvv L pp], opcode, ModRM, ...
struct Instruction {
  const unsigned char* bytes;
  const ucontext_t& context;

  int prefix() const { return bytes[2] & 3; }  // 0 none, 1 66, 2 F3, 3 F2
  int opcode() const { return bytes[3]; }
  int mode() const { return bytes[4] >> 6; }
  int reg() const { return bytes[4] >> 3 & 7; }
  int rm() const { return bytes[4] & 7; }
  int vvvv() const { return ~bytes[2] >> 3 & 15; }
  int extension(int bit) const { return bytes[1] >> bit & 1 ? 0 : 8; }  // R 7, X 6, B 5, stored inverted

  bool of_tiles() const {
    return bytes[0] == 0xc4 && (bytes[1] & 31) == 2 && (bytes[2] & 0x84) == 0 &&
           (opcode() == 0x49 || opcode() == 0x4b || opcode() == 0x5c || opcode() == 0x5e);
  }
  bool has_sib() const { return mode() != 3 && rm() == 4; }
  int displacement_bytes() const { return mode() == 1 ? 1 : mode() == 2 || no_base() ? 4 : 0; }
  bool no_base() const { return mode() == 0 && (has_sib() ? (bytes[5] & 7) == 5 : rm() == 5); }
  int length() const { return 5 + has_sib() + displacement_bytes(); }

  int64_t displacement() const {
    const unsigned char* at = bytes + 5 + has_sib();
    int32_t wide = 0;
    if (displacement_bytes() == 4) memcpy(&wide, at, sizeof wide);
    return displacement_bytes() == 1 ? static_cast<int8_t>(*at) : wide;
  }
  // The address without the index, which to tiles is the stride of their rows.
  char* base() const {
    int64_t address = displacement();
    if (no_base())
      address += has_sib() ? 0 : context.uc_mcontext.gregs[REG_RIP] + length();
    else
      address += register_value(context, (has_sib() ? bytes[5] & 7 : rm()) | extension(5));
    return reinterpret_cast<char*>(address);
  }
  int64_t stride() const {
    const int index = (bytes[5] >> 3 & 7) | extension(6);
    return index == 4 ? 0 : register_value(context, index) << (bytes[5] >> 6);
  }
};

void execute(const Instruction& in) {
  const int kNone = 0, k66 = 1, kF3 = 2, kF2 = 3, prefix = in.prefix();
  if (in.opcode() == 0x49 && prefix == kNone && in.mode() == 3) return amx_emulation::release();
  if (in.opcode() == 0x49 && prefix == kNone) return amx_emulation::load_configuration(in.base());
  if (in.opcode() == 0x49 && prefix == kF2 && in.mode() == 3) return amx_emulation::zero(in.reg());
  if (in.opcode() == 0x4b && (prefix == kF2 || prefix == k66) && in.has_sib())
    return amx_emulation::load(in.reg(), in.base(), in.stride());
  if (in.opcode() == 0x4b && prefix == kF3 && in.has_sib())
    return amx_emulation::store(in.reg(), in.base(), in.stride());
  if (in.opcode() == 0x5c && prefix == kF3) return amx_emulation::dot_bfloat16(in.reg(), in.rm(), in.vvvv());
  if (in.opcode() == 0x5e && prefix == kF2) return amx_emulation::dot_int8(in.reg(), in.rm(), in.vvvv());
  require(false, "a tile instruction that is not known here");
}

struct sigaction previous;

void on_illegal_instruction(int, siginfo_t*, void* raw) {
  ucontext_t& context = *static_cast<ucontext_t*>(raw);
  const Instruction in = {reinterpret_cast<const unsigned char*>(context.uc_mcontext.gregs[REG_RIP]), context};
  if (!in.of_tiles()) {
    sigaction(SIGILL, &previous, nullptr);  // the instruction is tried again, and dies as it would have
    return;
  }
  execute(in);
  context.uc_mcontext.gregs[REG_RIP] += in.length();
}

__attribute__((constructor)) void install() {
  struct sigaction action = {};
  action.sa_sigaction = on_illegal_instruction;
  action.sa_flags = SA_SIGINFO | SA_NODEFER;
  sigaction(SIGILL, &action, &previous);
}

}  // namespace
}  // namespace iceformer
