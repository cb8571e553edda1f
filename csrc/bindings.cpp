// The module esm_fast._C: checks, numpy arrays in and out, the GIL released around the work; no logic of its own.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include "checksum.h"
#include "esm.h"
#include "threads.h"

namespace py = pybind11;
using namespace py::literals;

namespace esm::cpu {
void bind(py::module_& module);  // cpu/bindings/
}

namespace {

// Contiguous, converted if need be.
template <class T>
using Array = py::array_t<T, py::array::c_style | py::array::forcecast>;

py::array_t<uint8_t> to_array(esm::Bytes&& bytes) {
    const size_t size = bytes.size();
    uint8_t* data = bytes.release();
    return py::array_t<uint8_t>(size, data, py::capsule(data, [](void* memory) { std::free(memory); }));
}

template <class T>
py::array_t<T> to_array(const std::vector<T>& values) {
    return py::array_t<T>(values.size(), values.data());
}

// (n + 1,) offsets from n ends.
py::array_t<int64_t> to_offsets(const std::vector<int64_t>& ends) {
    py::array_t<int64_t> offsets(ends.size() + 1);
    offsets.mutable_data()[0] = 0;
    std::copy(ends.begin(), ends.end(), offsets.mutable_data() + 1);
    return offsets;
}

py::buffer_info contiguous_bytes(const py::buffer& data, const char* function) {
    py::buffer_info info = data.request();
    if (info.ndim != 1 || info.itemsize != 1 || (info.size > 1 && info.strides[0] != 1))
        throw py::type_error(std::string(function) + " takes contiguous bytes");
    return info;
}

void feed(esm::FastaParser& parser, const py::buffer& data) {
    const py::buffer_info info = contiguous_bytes(data, "feed()");
    py::gil_scoped_release release;
    parser.feed(static_cast<const uint8_t*>(info.ptr), size_t(info.size));
}

py::tuple take(esm::FastaParser& parser) {
    esm::RecordBatch batch = parser.take();
    py::list headers(batch.header_ends.size());
    size_t start = 0;
    for (size_t i = 0; i < batch.header_ends.size(); ++i) {
        const size_t end = batch.header_ends[i];
        PyObject* text = PyUnicode_DecodeUTF8(batch.headers.data() + start, Py_ssize_t(end - start), "replace");
        if (!text) throw py::error_already_set();
        PyList_SET_ITEM(headers.ptr(), Py_ssize_t(i), text);
        start = end;
    }
    return py::make_tuple(headers, to_array(batch.lines), to_array(std::move(batch.residues)),
                          to_offsets(batch.residue_ends));
}

py::object stray(const esm::FastaParser& parser) {
    if (!parser.stray_line()) return py::none();
    return py::make_tuple(parser.stray_line(), py::bytes(parser.stray_text()));
}

py::object large(const esm::FastaParser& parser) {
    if (!parser.large_line()) return py::none();
    return py::make_tuple(parser.large_line(), py::bytes(parser.large_header()));
}

// (tokens, None), or (None, (row, begin, end)) for the first row with an unknown run.
py::tuple encode_texts(const py::tuple& strings, size_t limit) {
    std::vector<esm::Text> texts;
    texts.reserve(strings.size());
    for (py::handle string : strings) {  // the tuple keeps the strings, and so these pointers, alive
        if (!PyUnicode_Check(string.ptr()) || !PyUnicode_IS_ASCII(string.ptr()))
            throw py::type_error("encode_texts() takes ASCII strings");
        texts.push_back({static_cast<const uint8_t*>(PyUnicode_DATA(string.ptr())),
                         size_t(PyUnicode_GET_LENGTH(string.ptr()))});
    }
    esm::EncodedTexts encoded;
    size_t longest = 0;
    {
        py::gil_scoped_release release;
        encoded = esm::encode_texts(texts);
        for (size_t& count : encoded.counts) longest = std::max(longest, count = std::min(count, limit));
    }
    for (size_t i = 0; i < texts.size(); ++i) {
        const esm::Run& run = encoded.unknown[i];
        if (run.end) return py::make_tuple(py::none(), py::make_tuple(i, run.begin, run.end));
    }
    py::array_t<int64_t> tokens({texts.size(), longest + 2});
    int64_t* out = tokens.mutable_data();
    {
        py::gil_scoped_release release;
        esm::fill_rows(encoded, longest + 2, out);
    }
    return py::make_tuple(tokens, py::none());
}

// (ids, offsets, unknown, first_unknown, stops): see RecordCheck for the last three, each one a record.
py::tuple encode_records(const Array<uint8_t>& residues, const Array<int64_t>& offsets) {
    const size_t n = size_t(offsets.size()) - 1;
    const int64_t* from = offsets.data();
    if (offsets.size() < 1 || from[0] < 0 || from[n] > residues.size() || !std::is_sorted(from, from + n + 1))
        throw py::value_error("offsets must rise and lie within the residues");
    py::array_t<int64_t> offsets_out(n + 1), unknown(n), first(n);
    py::array_t<bool> stops(n);
    esm::Bytes ids;
    std::vector<esm::RecordCheck> checks(n);
    {
        const uint8_t* data = residues.data();
        int64_t* out = offsets_out.mutable_data();
        py::gil_scoped_release release;
        esm::encode_records(data, from, n, ids, out, checks.data());
    }
    for (size_t i = 0; i < n; ++i) {
        unknown.mutable_data()[i] = checks[i].unknown;
        first.mutable_data()[i] = checks[i].first_unknown;
        stops.mutable_data()[i] = checks[i].stop;
    }
    return py::make_tuple(to_array(std::move(ids)), offsets_out, unknown, first, stops);
}

// Views of one array, a batch each.
py::list plan(const Array<int64_t>& lengths, int64_t budget) {
    const size_t n = size_t(lengths.size());
    py::array_t<int64_t> order(n);
    std::vector<size_t> ends;
    {
        const int64_t* from = lengths.data();
        int64_t* out = order.mutable_data();
        py::gil_scoped_release release;
        ends = esm::plan(from, n, budget, out);
    }
    py::list batches;
    size_t start = 0;
    for (size_t end : ends) {
        batches.append(py::array_t<int64_t>(end - start, order.data() + start, order));
        start = end;
    }
    return batches;
}

// (tokens, positions, cu_seqlens, max_seqlen)
py::tuple pack(const Array<uint8_t>& ids, const Array<int64_t>& starts, const Array<int64_t>& lengths,
               const Array<int64_t>& order) {
    if (starts.size() != lengths.size()) throw py::value_error("starts and lengths differ in length");
    const esm::PackSource source{ids.data(),     ids.size(),   starts.data(),       lengths.data(),
                                 lengths.size(), order.data(), size_t(order.size())};
    py::array_t<int32_t> cu_seqlens(source.b + 1);
    int32_t* ends = cu_seqlens.mutable_data();
    const int64_t longest = esm::pack_offsets(source, ends);
    py::array_t<int32_t> tokens(ends[source.b]), positions(ends[source.b]);
    {
        int32_t *token = tokens.mutable_data(), *position = positions.mutable_data();
        py::gil_scoped_release release;
        esm::pack(source, ends, token, position);
    }
    return py::make_tuple(tokens, positions, cu_seqlens, longest);
}

// One checksum a piece: bytes bounds[i] to bounds[i + 1].
py::array_t<uint64_t> piece_checksums(const py::buffer& data, const Array<int64_t>& bounds) {
    const py::buffer_info info = contiguous_bytes(data, "piece_checksums()");
    const int64_t* at = bounds.data();
    const size_t n = size_t(bounds.size()) - 1;
    if (bounds.ndim() != 1 || bounds.size() < 1 || at[0] < 0 || at[n] > info.size || !std::is_sorted(at, at + n + 1))
        throw py::value_error("bounds must rise and lie within the data");
    py::array_t<uint64_t> sums(n);
    uint64_t* out = sums.mutable_data();
    {
        const char* bytes = static_cast<const char*>(info.ptr);
        py::gil_scoped_release release;
        for (size_t i = 0; i < n; ++i) out[i] = esm::checksum(bytes + at[i], size_t(at[i + 1] - at[i]));
    }
    return sums;
}

void set_threads(int n) {
    if (n < 1 || n > 4096) throw py::value_error("the number of threads is from 1 to 4096");
    py::gil_scoped_release release;
    esm::set_threads(n);
}

}  // namespace

PYBIND11_MODULE(_C, module) {
    module.def("threads", &esm::threads);
    module.def("set_threads", &set_threads, "n"_a);
    py::class_<esm::FastaParser>(module, "FastaParser")
        .def(py::init<size_t>(), "limit"_a)
        .def("feed", &feed, "data"_a)
        .def("finish", &esm::FastaParser::finish)
        .def("take", &take)
        .def_property_readonly("ready", &esm::FastaParser::ready)
        .def_property_readonly("stray", &stray)
        .def_property_readonly("large", &large);
    module.def("encode_texts", &encode_texts, "strings"_a, "limit"_a);
    module.def("encode_records", &encode_records, "residues"_a, "offsets"_a);
    module.def("plan", &plan, "lengths"_a, "budget"_a);
    module.def("pack", &pack, "ids"_a, "starts"_a, "lengths"_a, "order"_a);
    module.def("piece_checksums", &piece_checksums, "data"_a, "bounds"_a);
    esm::cpu::bind(module);
}
