#include <algorithm>
#include <cmath>
#include <cstdio>

#include "base/clock.h"
#include "base/error.h"
#include "base/random.h"
#include "base/text.h"
#include "data/text/chat_template.h"
#include "data/text/conversation.h"
#include "data/text/records.h"
#include "tools/compute/setup.h"
#include "tools/compute_verbs.h"
#include "tools/recipe_inputs.h"

namespace tailor {
namespace {

struct Question {
  Conversation conversation;
  std::string user, expected;
};

std::string content_of(const Message& message) {
  const auto found = message.fields.find("content");
  return found != message.fields.end() && found->is_string() ? found->get<std::string>()
                                                             : std::string();
}

std::vector<Question> read_questions(const GenerateArguments& arguments) {
  std::vector<Question> out;
  for (const std::string& prompt : arguments.prompts) {
    Question question;
    question.user = prompt;
    question.conversation.where = "--prompt";
    question.conversation.messages.push_back(
        {"user", {{"role", "user"}, {"content", prompt}}, std::nullopt});
    out.push_back(std::move(question));
  }
  if (arguments.data.empty()) return out;
  RecordReader reader(expand_files(arguments.data).front(), RecordFormat::automatic, 0);
  while (static_cast<std::int64_t>(out.size()) < arguments.limit) {
    std::optional<Record> record = reader.next();
    if (!record) break;
    auto* conversation = std::get_if<Conversation>(&record->content);
    if (conversation == nullptr || conversation->messages.empty()) {
      throw Error(Fault::bad_file, {"this line holds no conversation", record->where,
                                    "generate --data reads chat lines with \"messages\"."});
    }
    Question question{std::move(*conversation), "", ""};
    auto& messages = question.conversation.messages;
    if (messages.back().role == "assistant") {
      question.expected = content_of(messages.back());
      messages.pop_back();
    }
    if (!messages.empty()) question.user = content_of(messages.back());
    out.push_back(std::move(question));
  }
  return out;
}

/// Greedy at temperature 0 (lowest id on ties), else drawn from softmax(logits / temperature) with
/// a number named by (seed, question, place), so that a run can be repeated.
std::int32_t choose(const at::Tensor& logits_V, double temperature, std::uint64_t seed,
                    std::uint64_t question, std::uint64_t place) {
  const at::Tensor wide = logits_V.to(at::kDouble).contiguous();
  const std::span<const double> logits(wide.data_ptr<double>(),
                                       static_cast<std::size_t>(wide.numel()));
  const auto best = std::max_element(logits.begin(), logits.end());
  if (temperature <= 0) return static_cast<std::int32_t>(best - logits.begin());
  double total = 0;
  for (const double logit : logits) total += std::exp((logit - *best) / temperature);
  double left = random_unit(seed, RandomStream::sample, question, place) * total;
  for (std::size_t i = 0; i < logits.size(); ++i) {
    left -= std::exp((logits[i] - *best) / temperature);
    if (left < 0) return static_cast<std::int32_t>(i);
  }
  return static_cast<std::int32_t>(best - logits.begin());
}

}  // namespace

int run_generate(const GenerateArguments& arguments) {
  require_cpu(arguments.device, "--device");
  set_threads(arguments.threads);
  const fs::path folder = find_model_folder(arguments.model);
  const Tokenizer tokenizer = load_tokenizer(folder, read_model_spec(folder).vocab);
  const ChatTemplate chat = ChatTemplate::load(tokenizer, arguments.chat_template);
  const std::vector<Question> questions = read_questions(arguments);
  if (questions.empty()) {
    throw Error(Fault::usage, {"there is nothing to answer", "--prompt, --data",
                               "Give --prompt \"...\" or --data FILE."});
  }
  OpenedModel model = open_model(folder, compute_type(arguments.dtype));
  std::optional<Adapter> adapter;
  if (!arguments.adapter.empty()) {
    adapter = open_adapter(arguments.adapter, model);
    model.decoder->set_adapter(&*adapter);
  }
  const std::vector<std::int32_t>& stops = tokenizer.eos_ids();
  Json out = Json::array();
  for (std::size_t q = 0; q < questions.size(); ++q) {
    const Question& question = questions[q];
    const std::vector<std::int32_t> prompt = encode_prompt(chat, question.conversation);
    const double began = seconds_now();
    GenerationState state = model.decoder->start_generation(
        static_cast<std::int64_t>(prompt.size()) + arguments.tokens_max);
    StreamDecoder stream(tokenizer, true);
    std::string answer;
    if (!arguments.json) std::printf("user       %s\n%s", question.user.c_str(), "assistant  ");
    const auto say = [&](const std::string& piece) {
      answer += piece;
      if (arguments.json) return;
      std::fputs(piece.c_str(), stdout);
      std::fflush(stdout);
    };
    at::Tensor logits = model.decoder->next_logits(state, prompt);
    std::int64_t count = 0;
    bool ended = false;
    while (count < arguments.tokens_max) {
      const std::int32_t id = choose(logits, arguments.temperature, arguments.seed, q,
                                     static_cast<std::uint64_t>(count));
      ++count;
      ended = std::find(stops.begin(), stops.end(), id) != stops.end();
      if (ended) break;
      say(stream.push(id));
      if (count < arguments.tokens_max)
        logits = model.decoder->next_logits(state, std::span(&id, 1));
    }
    say(stream.finish());
    const double seconds = seconds_now() - began;
    out.push_back({{"prompt", question.user},
                   {"answer", answer},
                   {"expected", question.expected.empty() ? Json() : Json(question.expected)},
                   {"tokens", count},
                   {"ended", ended},
                   {"seconds", seconds}});
    if (arguments.json) continue;
    std::printf("%s\n", ended ? "" : " [cut at --tokens-max]");
    if (!question.expected.empty()) std::printf("expected   %s\n", question.expected.c_str());
    std::printf("\n");
  }
  if (arguments.json) std::printf("%s\n", out.dump().c_str());
  return 0;
}

}  // namespace tailor
