// A device for torch that is main memory under another name. What runs there is computed by the CPU's own kernels, so
// that results are the CPU's; but tensors of the two do not mix, as on a GPU, and its memory has a limit and a peak.

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/extension.h>

#include <atomic>

using at::Tensor;
using Sizes = c10::SymIntArrayRef;

namespace {

constexpr auto TYPE = c10::DeviceType::PrivateUse1;
const c10::Device DEVICE(TYPE, 0);
const c10::DispatchKeySet KEYS(c10::DispatchKey::PrivateUse1);

// ---- memory

std::atomic<int64_t> used{0}, peak{0}, limit{int64_t(1) << 60};

struct Block {
  void* data;
  int64_t size;
};

void give_back(void* context) {
  auto block = static_cast<Block*>(context);
  used -= block->size;
  free(block->data);
  delete block;
}

struct Allocator final : at::Allocator {
  c10::DataPtr allocate(size_t n) override {
    TORCH_CHECK_WITH(
        OutOfMemoryError, used + int64_t(n) <= limit, "Device out of memory. Tried to allocate ", n, " bytes.");
    used += n;
    if (used > peak) peak = used.load();
    void* data = n ? malloc(n) : nullptr;
    return {data, new Block{data, int64_t(n)}, give_back, DEVICE};
  }
  at::DeleterFnPtr raw_deleter() const override { return nullptr; }
  void copy_data(void* to, const void* from, size_t n) const override { memcpy(to, from, n); }
} allocator;

// ---- what torch asks of every device

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::Stream stream() const { return c10::Stream(c10::Stream::DEFAULT, DEVICE); }
  c10::DeviceType type() const override { return TYPE; }
  c10::Device exchangeDevice(c10::Device) const override { return DEVICE; }
  c10::Device getDevice() const override { return DEVICE; }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::Stream getStream(c10::Device) const override { return stream(); }
  c10::Stream getNewStream(c10::Device, int) const override { return stream(); }
  c10::Stream exchangeStream(c10::Stream) const override { return stream(); }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  void record(void**, const c10::Stream&, c10::DeviceIndex, c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, c10::DeviceIndex) const noexcept override {}
  void synchronizeEvent(void*) const override {}
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
};

// A generator of this device, whose numbers are those of a CPU's with the same seed.
struct Generator final : at::CPUGeneratorImpl {
  at::Generator inner = at::detail::createCPUGenerator(0);
  Generator() {
    device_ = DEVICE;
    key_set_ = KEYS;
  }
  void set_current_seed(uint64_t seed) override { inner.set_current_seed(seed); }
  uint64_t current_seed() const override { return inner.current_seed(); }
  uint64_t seed() override { return inner.seed(); }
};

struct Hooks final : at::PrivateUse1HooksInterface {
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  bool isAvailable() const override { return true; }
  at::Generator getNewGenerator(c10::DeviceIndex) const override {
    return at::Generator(c10::make_intrusive<Generator>());
  }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override {
    static at::Generator generator = getNewGenerator(0);
    return generator;
  }
};

// ---- operations that are the device's own

// The same memory as a tensor of the CPU.
Tensor host(const Tensor& tensor) {
  if (!tensor.defined() || tensor.device().type() != TYPE) return tensor;
  auto storage = tensor.storage();
  auto entries = int64_t(storage.nbytes() / tensor.itemsize());
  auto options = tensor.options().device(c10::kCPU).requires_grad(false);
  auto flat = at::from_blob(storage.mutable_data(), {entries}, [storage](void*) {}, options);
  return flat.as_strided(tensor.sizes(), tensor.strides(), tensor.storage_offset());
}

Tensor empty(
    c10::IntArrayRef size, std::optional<c10::ScalarType> type, std::optional<c10::Layout>, std::optional<c10::Device>,
    std::optional<bool>, std::optional<c10::MemoryFormat> format) {
  return at::detail::empty_generic(size, &allocator, KEYS, c10::dtype_or_default(type), format);
}

Tensor empty_strided(
    c10::IntArrayRef size, c10::IntArrayRef stride, std::optional<c10::ScalarType> type, std::optional<c10::Layout>,
    std::optional<c10::Device>, std::optional<bool>) {
  return at::detail::empty_strided_generic(size, stride, &allocator, KEYS, c10::dtype_or_default(type));
}

Tensor copy_from(const Tensor& from, const Tensor& to, bool) {
  at::AutoDispatchBelowADInplaceOrView below;
  host(to).copy_(host(from));
  return to;
}

Tensor copy_from_and_resize(const Tensor& from, const Tensor& to) {
  if (to.sizes() != from.sizes()) to.resize_(from.sizes());  // which leaves a view's strides
  return copy_from(from, to, false);
}

const Tensor& resize(const Tensor& self, Sizes sizes, std::optional<c10::MemoryFormat>) {
  auto size = C10_AS_INTARRAYREF_SLOW(sizes);
  auto storage = self.storage().unsafeGetStorageImpl();
  auto bytes = size_t(c10::multiply_integers(size)) * self.itemsize();
  if (bytes > storage->nbytes()) {
    auto data = allocator.allocate(bytes);
    memcpy(data.get(), storage->data(), storage->nbytes());
    storage->set_data_ptr_noswap(std::move(data));
    storage->set_nbytes(bytes);
  }
  self.unsafeGetTensorImpl()->set_sizes_contiguous(size);
  return self;
}

Tensor& set_storage(Tensor& self, c10::Storage storage, c10::SymInt offset, Sizes size, Sizes stride) {
  auto tensor = self.unsafeGetTensorImpl();
  tensor->set_storage_keep_dtype(storage);
  tensor->set_storage_offset(offset.expect_int());
  tensor->set_sizes_and_strides(C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride));
  return self;
}

Tensor as_strided(const Tensor& self, Sizes size, Sizes stride, std::optional<c10::SymInt> offset) {
  auto start = offset ? std::optional<int64_t>(offset->expect_int()) : std::nullopt;
  return at::native::as_strided_tensorimpl(self, C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride), start);
}

Tensor view(const Tensor& self, Sizes size) { return at::native::view(self, C10_AS_INTARRAYREF_SLOW(size)); }

Tensor reshape_alias(const Tensor& self, Sizes size, Sizes stride) {
  return at::native::_reshape_alias(self, C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride));
}

c10::Scalar item(const Tensor& self) { return at::_local_scalar_dense(host(self)); }

void check_together(const char* name, std::initializer_list<Tensor> tensors) {
  for (const auto& tensor : tensors)
    TORCH_CHECK(!tensor.defined() || tensor.device().type() == TYPE, name, ": a tensor of the CPU among the device's");
}

Tensor convolution(
    const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, Sizes stride, Sizes padding,
    Sizes dilation, bool transposed, Sizes output_padding, c10::SymInt groups) {
  auto shift = bias.value_or(Tensor());
  check_together("convolution", {x, weight, shift});
  auto own = shift.defined() ? std::optional<Tensor>(host(shift)) : std::nullopt;
  return at::convolution_symint(
             host(x), host(weight), own, stride, padding, dilation, transposed, output_padding, groups)
      .to(DEVICE);
}

std::tuple<Tensor, Tensor, Tensor> convolution_backward(
    const Tensor& grad, const Tensor& x, const Tensor& weight, Sizes stride, Sizes padding, Sizes dilation,
    bool transposed, Sizes output_padding, c10::SymInt groups, std::array<bool, 3> wanted) {
  check_together("convolution_backward", {grad, x, weight});
  std::vector<c10::SymInt> bias{grad.sym_size(1)};
  auto [a, b, c] = at::convolution_backward_symint(
      host(grad), host(x), host(weight), Sizes(bias), stride, padding, dilation, transposed, output_padding, groups,
      wanted);
  auto back = [](const Tensor& tensor) { return tensor.defined() ? tensor.to(DEVICE) : tensor; };
  return {back(a), back(b), back(c)};
}

// ---- everything else, on the CPU: but for numbers, and for indices, all tensors must be the device's

void fallback(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& name = op.schema().operator_name().name;
  const bool indexing = name == "aten::index" || name == "aten::index_put_" || name == "aten::_index_put_impl_";
  auto check = [&](const Tensor& tensor) {
    TORCH_CHECK(
        !tensor.defined() || tensor.device().type() == TYPE || tensor.dim() == 0 || indexing,
        name, ": a tensor of the CPU, of sizes ", tensor.sizes(), ", among the device's");
  };
  for (auto& argument : torch::jit::last(*stack, op.schema().arguments().size())) {
    if (argument.isTensor()) check(argument.toTensor());
    if (argument.isTensorList())
      for (const Tensor& tensor : argument.toTensorVector()) check(tensor);
    if (argument.isGenerator()) {
      auto generator = argument.toGenerator();
      TORCH_CHECK(generator.device().type() == TYPE, name, ": a generator of the CPU for a tensor of the device");
      auto own = static_cast<Generator*>(generator.unsafeGetGeneratorImpl());
      const_cast<c10::IValue&>(argument) = c10::IValue(own->inner);
    }
  }
  at::native::cpu_fallback(op, stack);
}

}  // namespace

C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);
REGISTER_ALLOCATOR(TYPE, &allocator);

TORCH_LIBRARY_IMPL(_, PrivateUse1, library) {
  library.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>());
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, library) {
  library.impl("empty.memory_format", empty);
  library.impl("empty_strided", empty_strided);
  library.impl("_copy_from", copy_from);
  library.impl("_copy_from_and_resize", copy_from_and_resize);
  library.impl("_local_scalar_dense", item);
  library.impl("resize_", resize);
  library.impl("set_.source_Storage_storage_offset", set_storage);
  library.impl("as_strided", as_strided);
  library.impl("view", view);
  library.impl("_reshape_alias", reshape_alias);
  library.impl("convolution_overrideable", convolution);
  library.impl("convolution_backward_overrideable", convolution_backward);
}

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  module.def("register", [] { at::RegisterPrivateUse1HooksInterface(new Hooks()); });
  module.def("used", [] { return used.load(); });
  module.def("peak", [] { return peak.load(); });
  module.def("reset_peak", [] { peak = used.load(); });
  module.def("set_limit", [](int64_t bytes) { limit = bytes; });
}
