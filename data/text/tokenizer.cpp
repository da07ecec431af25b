#include "data/text/tokenizer.h"

#include <algorithm>
#include <deque>
#include <unordered_set>
#include <utility>

#include "base/error.h"
#include "base/json.h"
#include "base/text.h"
#include "data/text/added_tokens.h"
#include "data/text/bpe.h"
#include "data/text/nfc.h"
#include "data/text/pre_tokenizer.h"
#include "data/text/unicode.h"

namespace tailor {
namespace {

[[noreturn]] void refuse(const std::string& what, const std::string& where) {
  throw Error(
      Fault::bad_file,
      {what, where,
       "Tailor reads byte-level BPE tokenizers exactly as Hugging Face's tokenizers does, and "
       "refuses what it would read differently. Use the tokenizer.json the model was "
       "published with."});
}

/// tokenizer.json with keys in hash order: base/json.h keeps the written order, which takes
/// quadratic time for a vocabulary.
nlohmann::json parse_tokenizer(std::string_view text, const std::string& where) {
  try {
    return nlohmann::json::parse(text);
  } catch (const nlohmann::json::parse_error& error) {
    throw Error(Fault::bad_file, {"not valid JSON", where + ": byte " + std::to_string(error.byte),
                                  "Repair the file or fetch it again; it may be cut off."});
  }
}

/// Whether the normalizer is NFC (true) or nothing (false).
bool wants_nfc(const nlohmann::json& normalizer, const std::string& where, int depth = 0) {
  if (normalizer.is_null()) return false;
  const std::string type =
      normalizer.is_object() && normalizer.contains("type") && normalizer["type"].is_string()
          ? normalizer["type"].get<std::string>()
          : std::string();
  if (type == "NFC" && normalizer.size() == 1) return true;
  if (type == "Sequence" && normalizer.size() == 2 && normalizer.contains("normalizers") &&
      normalizer["normalizers"].is_array() && depth < 8) {
    bool nfc = false;
    for (const nlohmann::json& part : normalizer["normalizers"]) {
      nfc = wants_nfc(part, where, depth + 1) || nfc;
    }
    return nfc;
  }
  refuse("normalizer '" + type + "' is not supported, only NFC is", where + " (normalizer)");
}

void check_decoder(const nlohmann::json& decoder, const std::string& where, int depth = 0) {
  const std::string type =
      decoder.is_object() && decoder.contains("type") && decoder["type"].is_string()
          ? decoder["type"].get<std::string>()
          : std::string(decoder.is_null() ? "null" : "");
  if (type == "ByteLevel") return;
  if (type == "Sequence" && decoder.contains("decoders") && decoder["decoders"].is_array() &&
      decoder["decoders"].size() == 1 && depth < 8) {
    return check_decoder(decoder["decoders"][0], where, depth + 1);
  }
  refuse("decoder '" + type + "' is not supported, only ByteLevel is", where + " (decoder)");
}

/// Whether the post-processor puts a special token before a text.
bool begins_with_special(const nlohmann::json& processor, int depth = 0) {
  if (!processor.is_object() || depth > 8) return false;
  const auto processors = processor.find("processors");
  if (processors != processor.end() && processors->is_array()) {
    return std::any_of(processors->begin(), processors->end(),
                       [&](const auto& p) { return begins_with_special(p, depth + 1); });
  }
  const auto single = processor.find("single");
  return single != processor.end() && single->is_array() && !single->empty() &&
         single->front().is_object() && single->front().contains("SpecialToken");
}

}  // namespace

struct Tokenizer::State {
  fs::path folder;
  std::string digest;
  BytePairModel model;
  AddedTokens added;
  PreTokenizer pre_tokenizer;
  bool nfc = false;
  std::vector<std::string> bytes;  ///< of each id; "" for a gap
  std::unordered_set<std::int32_t> special;
  bool adds_bos = false;
  std::vector<std::pair<std::string, std::string>> special_texts;  ///< bos_token, ... -> text
  std::optional<std::int32_t> bos, eos, pad;
  std::vector<std::int32_t> eos_ids;

  State(const nlohmann::json& file, const std::string& where)
      : model(file.value("model", nlohmann::json()), where),
        added(file.value("added_tokens", nlohmann::json()), model, where),
        pre_tokenizer(file.value("pre_tokenizer", nlohmann::json()), where) {}

  void read_configs();
  std::optional<std::int32_t> id_of(std::string_view token) const;
  void encode_gap(std::string_view text, std::span<const ByteRange> protected_ranges,
                  std::vector<std::int32_t>& out) const;
  void encode_words(std::string_view text, std::vector<std::int32_t>& out) const;
};

namespace {

/// The parts of sorted `ranges` that lie in `window`, counted from its begin.
std::vector<ByteRange> clip(std::span<const ByteRange> ranges, ByteRange window) {
  std::vector<ByteRange> out;
  for (const ByteRange range : ranges) {
    const std::size_t begin = std::max(range.begin, window.begin);
    const std::size_t end = std::min(range.end, window.end);
    if (begin < end) out.push_back({begin - window.begin, end - window.begin});
  }
  return out;
}

}  // namespace

Tokenizer Tokenizer::load(const fs::path& model_folder) {
  const fs::path path = model_folder / "tokenizer.json";
  if (!fs::exists(path)) {
    const bool sentencepiece = fs::exists(model_folder / "tokenizer.model");
    throw Error(
        Fault::bad_file,
        {"there is no tokenizer.json", model_folder.string(),
         sentencepiece ? "The folder has tokenizer.model only. Write tokenizer.json with "
                         "transformers: AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)."
                       : "Name a model's folder, as downloaded from Hugging Face."});
  }
  const std::string where = path.string();
  const std::string text = read_text(path);
  const nlohmann::json file = parse_tokenizer(text, where);
  if (!file.is_object()) refuse("tokenizer.json must be a JSON object", where);
  static constexpr std::string_view kKnown[] = {"version",        "truncation", "padding",
                                                "added_tokens",   "normalizer", "pre_tokenizer",
                                                "post_processor", "decoder",    "model"};
  for (const auto& [key, value] : file.items()) {
    if (std::find(std::begin(kKnown), std::end(kKnown), key) == std::end(kKnown)) {
      refuse("unknown key '" + key + "'", where);
    }
  }
  if (file.value("version", nlohmann::json()) != "1.0") refuse("'version' must be \"1.0\"", where);
  if (!file.contains("model")) refuse("'model' is missing", where);
  const nlohmann::json& model_type =
      file["model"].is_object() ? file["model"].value("type", nlohmann::json()) : nlohmann::json();
  if (model_type.is_string() && model_type != "BPE") {
    refuse("tokenizer model '" + model_type.get<std::string>() +
               "' is not supported, only byte-level BPE is",
           where + " (model)");
  }
  // Asked first, because "this is sentencepiece" says more than the parts that follow from it.
  const bool nfc = wants_nfc(file.value("normalizer", nlohmann::json()), where);
  check_decoder(file.value("decoder", nlohmann::json()), where);

  auto state = std::make_shared<State>(file, where);
  state->folder = model_folder;
  state->digest = sha256_hex(text);
  state->nfc = nfc;
  if (nfc) state->added.normalize([](std::string_view content) { return to_nfc(content); });
  std::int32_t size = state->model.size();
  for (const AddedToken& token : state->added.all()) size = std::max(size, token.id + 1);
  state->bytes.resize(static_cast<std::size_t>(size));
  for (const auto& [name, id] : state->model.ids()) {
    state->bytes[static_cast<std::size_t>(id)] = from_byte_alphabet(name);
  }
  for (const AddedToken& token : state->added.all()) {
    state->bytes[static_cast<std::size_t>(token.id)] = from_byte_alphabet(token.content);
    if (token.special) state->special.insert(token.id);
  }
  state->adds_bos = begins_with_special(file.value("post_processor", nlohmann::json()));
  state->read_configs();
  return Tokenizer(std::move(state));
}

std::optional<std::int32_t> Tokenizer::State::id_of(std::string_view token) const {
  if (const AddedToken* found = added.by_content(token)) return found->id;
  const auto found = model.ids().find(std::string(token));
  if (found == model.ids().end()) return std::nullopt;
  return found->second;
}

void Tokenizer::State::read_configs() {
  const fs::path config_path = folder / "tokenizer_config.json";
  if (fs::exists(config_path)) {
    const std::string where = config_path.string();
    const Json config = read_json(config_path);
    const JsonReader reader(config, where);
    for (const char* key : {"bos_token", "eos_token", "pad_token", "unk_token"}) {
      if (!reader.has(key)) continue;
      const Json& value = reader.at(key);
      const std::string name = value.is_object()
                                   ? JsonReader(value, where + " " + key).text("content")
                                   : reader.text(key);
      const auto id = id_of(name);
      if (!id) refuse(std::string(key) + " '" + name + "' is not in the vocabulary", where);
      special_texts.emplace_back(key, name);
      const std::string_view kind(key);
      if (kind == "bos_token") bos = id;
      if (kind == "eos_token") eos = id;
      if (kind == "pad_token") pad = id;
    }
    adds_bos = reader.boolean("add_bos_token", adds_bos);
    // transformers adds what this table has and tokenizer.json has not; then ids would differ.
    if (reader.has("added_tokens_decoder") && reader.at("added_tokens_decoder").is_object()) {
      for (const auto& [id, entry] : reader.at("added_tokens_decoder").items()) {
        const JsonReader token(entry, where + " added_tokens_decoder " + id);
        const auto known = id_of(token.text("content"));
        if (!known || std::to_string(*known) != id) {
          refuse(
              "token '" + token.text("content") + "' with id " + id + " is not in tokenizer.json",
              where + " (added_tokens_decoder)");
        }
      }
    }
  }
  const fs::path generation_path = folder / "generation_config.json";
  if (fs::exists(generation_path)) {
    const std::string where = generation_path.string();
    const Json config = read_json(generation_path);
    const JsonReader reader(config, where);
    const auto id_from = [&](const Json& value, const char* key) {
      if (!value.is_number_integer() || value < 0 || value > (1 << 30)) {
        refuse(std::string("'") + key + "' must be a token id or a list of them", where);
      }
      return value.get<std::int32_t>();
    };
    if (reader.has("eos_token_id")) {
      const Json& value = reader.at("eos_token_id");
      if (value.is_array()) {
        for (const Json& id : value) eos_ids.push_back(id_from(id, "eos_token_id"));
      } else {
        eos_ids.push_back(id_from(value, "eos_token_id"));
      }
    }
    if (!bos && reader.has("bos_token_id") && !reader.at("bos_token_id").is_array()) {
      bos = id_from(reader.at("bos_token_id"), "bos_token_id");
    }
    if (!pad && reader.has("pad_token_id") && !reader.at("pad_token_id").is_array()) {
      pad = id_from(reader.at("pad_token_id"), "pad_token_id");
    }
  }
  if (!eos && !eos_ids.empty()) eos = eos_ids.front();
  if (eos) eos_ids.push_back(*eos);
  std::sort(eos_ids.begin(), eos_ids.end());
  eos_ids.erase(std::unique(eos_ids.begin(), eos_ids.end()), eos_ids.end());
}

void Tokenizer::State::encode_words(std::string_view text, std::vector<std::int32_t>& out) const {
  if (text.empty()) return;
  std::vector<std::string_view> words;
  std::deque<std::string> scratch;
  pre_tokenizer.split(text, words, scratch);
  for (const std::string_view word : words) model.encode(word, out);
}

void Tokenizer::State::encode_gap(std::string_view text,
                                  std::span<const ByteRange> protected_ranges,
                                  std::vector<std::int32_t>& out) const {
  if (text.empty()) return;
  std::string normal;
  std::vector<ByteRange> ranges(protected_ranges.begin(), protected_ranges.end());
  if (nfc) {
    normal = to_nfc(text, ranges);
    text = normal;
  }
  std::size_t at = 0;
  for (const AddedTokens::Match& match : added.find(text, ranges, true)) {
    encode_words(text.substr(at, match.at.begin - at), out);
    out.push_back(match.id);
    at = match.at.end;
  }
  encode_words(text.substr(at), out);
}

std::vector<std::int32_t> Tokenizer::encode(std::string_view text) const {
  return encode(text, {});
}

std::vector<std::int32_t> Tokenizer::encode(std::string_view text,
                                            std::span<const ByteRange> protected_ranges) const {
  if (!is_utf8(text)) {
    throw Error(Fault::bad_file, {"a text to tokenise is not UTF-8", "",
                                  "Convert the data to UTF-8, for instance with iconv."});
  }
  std::vector<std::int32_t> out;
  out.reserve(text.size() / 3 + 8);
  std::size_t at = 0;
  const auto gap = [&](std::size_t end) {
    const std::vector<ByteRange> inside = clip(protected_ranges, {at, end});
    state_->encode_gap(text.substr(at, end - at), inside, out);
  };
  for (const AddedTokens::Match& match : state_->added.find(text, protected_ranges, false)) {
    gap(match.at.begin);
    out.push_back(match.id);
    at = match.at.end;
  }
  gap(text.size());
  return out;
}

std::vector<Tokenizer::AddedMatch> Tokenizer::find_added(
    std::string_view text, std::span<const ByteRange> protected_ranges) const {
  std::vector<AddedMatch> out;
  std::size_t at = 0;
  const auto gap = [&](std::size_t end) {
    const std::vector<ByteRange> inside = clip(protected_ranges, {at, end});
    for (const auto& match : state_->added.find(text.substr(at, end - at), inside, true)) {
      out.push_back({{match.at.begin + at, match.at.end + at}, match.id});
    }
  };
  for (const AddedTokens::Match& match : state_->added.find(text, protected_ranges, false)) {
    gap(match.at.begin);
    out.push_back({match.at, match.id});
    at = match.at.end;
  }
  gap(text.size());
  return out;
}

std::string_view Tokenizer::bytes_of(std::int32_t id) const {
  const bool known = id >= 0 && static_cast<std::size_t>(id) < state_->bytes.size();
  return known ? std::string_view(state_->bytes[static_cast<std::size_t>(id)]) : std::string_view();
}

std::string Tokenizer::decode(std::span<const std::int32_t> ids, bool skip_special) const {
  std::string bytes;
  for (const std::int32_t id : ids) {
    if (!skip_special || !is_special(id)) bytes += bytes_of(id);
  }
  return replace_ill_formed(bytes);
}

std::int32_t Tokenizer::vocab_size() const {
  return static_cast<std::int32_t>(state_->bytes.size());
}
std::optional<std::int32_t> Tokenizer::id_of(std::string_view token) const {
  return state_->id_of(token);
}
bool Tokenizer::is_added(std::int32_t id) const { return state_->added.by_id(id) != nullptr; }
bool Tokenizer::is_special(std::int32_t id) const { return state_->special.contains(id); }
std::optional<std::int32_t> Tokenizer::bos() const { return state_->bos; }
std::optional<std::int32_t> Tokenizer::eos() const { return state_->eos; }
std::optional<std::int32_t> Tokenizer::pad() const { return state_->pad; }
const std::vector<std::int32_t>& Tokenizer::eos_ids() const { return state_->eos_ids; }
bool Tokenizer::adds_bos() const { return state_->adds_bos; }
const std::string& Tokenizer::digest() const { return state_->digest; }
const fs::path& Tokenizer::folder() const { return state_->folder; }

std::string Tokenizer::special_text(std::string_view key) const {
  for (const auto& [name, text] : state_->special_texts) {
    if (name == key) return text;
  }
  return {};
}

std::string StreamDecoder::push(std::int32_t id) {
  if (!skip_special_ || !tokenizer_.is_special(id)) waiting_ += tokenizer_.bytes_of(id);
  const std::size_t whole = complete_utf8_prefix(waiting_);
  std::string out = replace_ill_formed(std::string_view(waiting_).substr(0, whole));
  waiting_.erase(0, whole);
  return out;
}

std::string StreamDecoder::finish() { return replace_ill_formed(std::exchange(waiting_, {})); }

}  // namespace tailor
