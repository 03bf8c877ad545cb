// The torch device "mock": host memory under the dispatch key of an accelerator.
//
// Kernels are the CPU's. Mixed operands are refused as an accelerator refuses them, and each wait of
// the host, each copy from it and each kernel is reported to a callback.
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/autocast_mode.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/native/Resize.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_as_complex_native.h>
#include <ATen/ops/view_as_real_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <cstdlib>
#include <cstring>
#include <set>
#include <string>

namespace {

using c10::Device;
using c10::DeviceIndex;
constexpr auto MOCK = c10::DeviceType::PrivateUse1;
const Device HERE(MOCK, 0);

// Reports ---------------------------------------------------------------------------------------

enum Kind : int { WAIT = 0, COPY_IN = 1, KERNEL = 2 };
using Callback = void (*)(int, const char*);
Callback callback = nullptr;
thread_local int depth = 0;  // above 0 a CPU kernel runs, whose own calls are no events

struct Quiet {
  Quiet() { ++depth; }
  ~Quiet() { --depth; }
};

void report(Kind kind, const std::string& name) {
  if (depth == 0 && callback != nullptr) callback(kind, name.c_str());
}

// Memory, device and random numbers -------------------------------------------------------------

struct HostMemory final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    void* start = bytes > 0 ? std::malloc(bytes) : nullptr;
    return {start, start, &std::free, HERE};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &std::free; }
  void copy_data(void* to, const void* from, std::size_t bytes) const override {
    std::memcpy(to, from, bytes);
  }
};
HostMemory host_memory;
REGISTER_ALLOCATOR(MOCK, &host_memory);

struct OneDevice final : c10::impl::DeviceGuardImplInterface {
  static constexpr auto static_type = MOCK;
  c10::DeviceType type() const override { return MOCK; }
  DeviceIndex deviceCount() const noexcept override { return 1; }
  Device getDevice() const override { return HERE; }
  Device exchangeDevice(Device) const override { return HERE; }
  void setDevice(Device) const override {}
  void uncheckedSetDevice(Device) const noexcept override {}
  c10::Stream getStream(Device) const override { return c10::Stream(c10::Stream::DEFAULT, HERE); }
  c10::Stream getDefaultStream(Device d) const override { return getStream(d); }
  c10::Stream getNewStream(Device d, int) const override { return getStream(d); }
  c10::Stream getStreamFromGlobalPool(Device d, bool) const override { return getStream(d); }
  c10::Stream exchangeStream(c10::Stream stream) const override { return stream; }
  bool queryEvent(void*) const override { return true; }
  void record(void**, const c10::Stream&, DeviceIndex, c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  void destroyEvent(void*, DeviceIndex) const noexcept override {}
  void synchronizeEvent(void*) const override { report(WAIT, "synchronize"); }
  void synchronizeStream(const c10::Stream&) const override { report(WAIT, "synchronize"); }
  void synchronizeDevice(DeviceIndex) const override { report(WAIT, "synchronize"); }
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, OneDevice);

// A generator of this device, around one of the CPU.
struct MockGenerator final : c10::GeneratorImpl {
  at::Generator cpu = at::detail::createCPUGenerator();
  MockGenerator()
      : c10::GeneratorImpl(HERE, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1)) {}
  c10::GeneratorImpl* inner() const { return cpu.unsafeGetGeneratorImpl(); }
  void set_current_seed(uint64_t seed) override { cpu.set_current_seed(seed); }
  uint64_t current_seed() const override { return cpu.current_seed(); }
  uint64_t seed() override { return inner()->seed(); }
  void set_offset(uint64_t) override {}
  uint64_t get_offset() const override { return 0; }
  void set_state(const c10::TensorImpl& state) override { inner()->set_state(state); }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override { return inner()->get_state(); }
  c10::GeneratorImpl* clone_impl() const override {
    auto* copy = new MockGenerator();
    copy->cpu = cpu.clone();
    return copy;
  }
};

const at::Generator& default_generator() {
  static const at::Generator generator = at::make_generator<MockGenerator>();
  return generator;
}

at::Generator of_cpu(const at::Generator& generator) {
  return static_cast<MockGenerator*>(generator.unsafeGetGeneratorImpl())->cpu;
}

struct Backend final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  void init() const override {}
  DeviceIndex deviceCount() const override { return 1; }
  DeviceIndex getCurrentDevice() const override { return 0; }
  void setCurrentDevice(DeviceIndex) const override {}
  DeviceIndex exchangeDevice(DeviceIndex) const override { return 0; }
  DeviceIndex maybeExchangeDevice(DeviceIndex) const override { return 0; }
  Device getDeviceFromPtr(void*) const override { return HERE; }
  bool isPinnedPtr(const void*) const override { return false; }
  at::Allocator* getPinnedMemoryAllocator() const override { return at::GetAllocator(at::kCPU); }
  const at::Generator& getDefaultGenerator(DeviceIndex) const override {
    return default_generator();
  }
  at::Generator getNewGenerator(DeviceIndex) const override {
    return at::make_generator<MockGenerator>();
  }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t bytes) const override {
    auto fresh = host_memory.allocate(bytes);
    if (const size_t kept = std::min(bytes, storage.nbytes())) {
      std::memcpy(fresh.get(), storage.data(), kept);
    }
    storage.unsafeGetStorageImpl()->set_data_ptr_noswap(std::move(fresh));
    storage.unsafeGetStorageImpl()->set_nbytes(bytes);
  }
};

// Kernels ---------------------------------------------------------------------------------------

// The size of their result depends on numbers, for which the host of an accelerator waits; or they
// are computed in turns between the two.
const std::set<std::string> WAIT_FOR_RESULT = {
    "aten::_linalg_eigh",  "aten::_linalg_eigvals",  "aten::_unique2",         "aten::bincount",
    "aten::equal",         "aten::is_nonzero",       "aten::linalg_eigh",      "aten::masked_select",
    "aten::nonzero",       "aten::repeat_interleave", "aten::unique_dim",
    "aten::unique_consecutive", "aten::unique_dim_consecutive"};

bool on_mock(const at::Tensor& t) { return t.device().type() == MOCK; }

// Operands are tensors of one device; a number that comes as a tensor may be the host's.
void check_operand(const at::Tensor& t, const std::string& op, bool indexing, bool writes) {
  if (!t.defined()) return;
  if (t.device().is_cpu() && t.dim() > 0) {
    TORCH_CHECK(indexing, op, ": expected all tensors to be on the same device, got mock:0 and cpu");
    if (writes) report(COPY_IN, op);  // indices of the host are copied; to read by one, before
  } else if (writes && t.scalar_type() == at::kBool) {  // reading by one calls nonzero
    report(WAIT, op + " by a mask");
  }
}

void kernel(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& parameters = op.schema().arguments();
  const std::string name = op.schema().name();
  const bool writes = name.rfind("aten::_index_put", 0) == 0 || name.rfind("aten::index_put", 0) == 0;
  const bool indexing = writes || name.rfind("aten::index", 0) == 0;
  const size_t first = stack->size() - parameters.size();
  for (size_t i = 0; i < parameters.size(); ++i) {
    c10::IValue& given = (*stack)[first + i];
    if (given.isTensor()) {
      check_operand(given.toTensor(), name, false, false);
    } else if (given.isTensorList()) {
      for (const at::Tensor& t : given.toTensorVector()) check_operand(t, name, indexing, writes);
    } else if (given.isOptionalTensorList()) {
      for (const auto& t : given.toOptionalTensorVector())
        if (t.has_value()) check_operand(*t, name, indexing, writes);
    } else if (given.isGenerator()) {
      const at::Generator generator = given.toGenerator();
      TORCH_CHECK(generator.device().type() == MOCK, name, ": expected a generator of mock, got cpu");
      given = of_cpu(generator);
    } else if (given.isNone() && parameters[i].type()->str().find("Generator") != std::string::npos) {
      given = of_cpu(default_generator());
    }
  }
  if (WAIT_FOR_RESULT.count(name) > 0) report(WAIT, name);
  report(KERNEL, name);
  const Quiet quiet;
  at::native::cpu_fallback(op, stack);
}

at::Tensor empty(at::IntArrayRef size, std::optional<at::ScalarType> dtype,
                 std::optional<at::Layout>, std::optional<Device>, std::optional<bool>,
                 std::optional<at::MemoryFormat> format) {
  const c10::DispatchKeySet keys(c10::DispatchKey::PrivateUse1);
  return at::detail::empty_generic(size, &host_memory, keys, c10::dtype_or_default(dtype), format);
}

at::Tensor empty_strided(at::IntArrayRef size, at::IntArrayRef stride,
                         std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                         std::optional<Device>, std::optional<bool>) {
  const c10::DispatchKeySet keys(c10::DispatchKey::PrivateUse1);
  return at::detail::empty_strided_generic(size, stride, &host_memory, keys,
                                           c10::dtype_or_default(dtype));
}

// The same memory as a tensor of the CPU.
at::Tensor as_cpu(const at::Tensor& t) {
  if (!on_mock(t)) return t;
  auto plain = at::from_blob(t.data_ptr(), t.sizes(), t.strides(),
                             at::TensorOptions().dtype(t.dtype()).device(at::kCPU));
  plain._set_conj(t.is_conj());
  plain._set_neg(t.is_neg());
  return plain;
}

void transfer(const at::Tensor& from, const at::Tensor& to) {
  const Quiet quiet;
  if (from.numel() > 0) as_cpu(to).copy_(as_cpu(from));
}

at::Tensor copy_from(const at::Tensor& from, const at::Tensor& to, bool) {
  if (!on_mock(to)) {
    report(WAIT, "copy to the cpu");
  } else if (!on_mock(from)) {
    report(COPY_IN, "copy from the cpu");
  } else {
    report(KERNEL, "aten::copy_");
  }
  transfer(from, to);
  return to;
}

at::Tensor copy_from_and_resize(const at::Tensor& from, const at::Tensor& to) {
  to.resize_(from.sizes());
  transfer(from, to);
  return to;
}

at::Scalar number(const at::Tensor& t) {
  report(WAIT, "a number is read");
  const Quiet quiet;
  return as_cpu(t).item();
}

const at::Tensor& resize(const at::Tensor& t, at::IntArrayRef size,
                         std::optional<at::MemoryFormat> format) {
  return at::native::resize_(t, size, format);
}

at::Tensor& set_storage_part(at::Tensor& t, at::Storage source, int64_t offset,
                             at::IntArrayRef size, at::IntArrayRef stride) {
  return at::native::set_storage_cpu_(t, source, offset, size, stride);
}

at::Tensor& set_storage(at::Tensor& t, at::Storage source) {
  const auto count = static_cast<int64_t>(source.nbytes() / t.dtype().itemsize());
  return at::native::set_storage_cpu_(t, source, 0, {count}, {1});
}

// Parameters keep their identity when a module moves, as they do between the CPU and CUDA.
bool swaps(const at::Tensor&, const at::Tensor&) { return true; }

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&kernel>());
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", &empty);
  m.impl("empty_strided", &empty_strided);
  m.impl("_copy_from", &copy_from);
  m.impl("_copy_from_and_resize", &copy_from_and_resize);
  m.impl("_local_scalar_dense", &number);
  m.impl("resize_", &resize);
  m.impl("set_.source_Storage", &set_storage);
  m.impl("set_.source_Storage_storage_offset", &set_storage_part);
  m.impl("_has_compatible_shallow_copy_type", &swaps);
  m.impl("_reshape_alias", &at::native::_reshape_alias);
  m.impl("alias", &at::native::alias);
  m.impl("as_strided", &at::native::as_strided_tensorimpl);
  m.impl("unfold", &at::native::unfold);
  m.impl("view", &at::native::view);
  m.impl("view_as_complex", &at::native::view_as_complex);
  m.impl("view_as_real", &at::native::view_as_real);
}

// Under autocast products have the lower precision, and what needs the range has float32.
TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1, m) {
  m.fallback(torch::CppFunction::makeFallthrough());
}

TORCH_LIBRARY_IMPL(aten, AutocastPrivateUse1, m) {
  KERNEL_PRIVATEUSEONE(addmm, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(baddbmm, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(bmm, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(linear, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(matmul, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(mm, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(scaled_dot_product_attention, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(layer_norm, fp32)
  KERNEL_PRIVATEUSEONE(log_softmax, int, fp32)
  KERNEL_PRIVATEUSEONE(softmax, int, fp32)
}

// For Python ------------------------------------------------------------------------------------

void manual_seed(int64_t seed) { of_cpu(default_generator()).set_current_seed(seed); }
at::Tensor get_rng_state() { return of_cpu(default_generator()).get_state(); }
void set_rng_state(const at::Tensor& state) { of_cpu(default_generator()).set_state(state); }

TORCH_LIBRARY(mock_device, m) {
  m.def("manual_seed(int seed) -> ()", &manual_seed);
  m.def("get_rng_state() -> Tensor", &get_rng_state);
  m.def("set_rng_state(Tensor state) -> ()", &set_rng_state);
}

Backend backend;
[[maybe_unused]] const bool registered = [] {
  at::RegisterPrivateUse1HooksInterface(&backend);
  return true;
}();

}  // namespace

extern "C" void mock_device_listen(Callback function) { callback = function; }
