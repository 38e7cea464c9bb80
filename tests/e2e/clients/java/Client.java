import com.fasterxml.jackson.annotation.JsonClassDescription;
import com.openai.client.OpenAIClient;
import com.openai.client.okhttp.OpenAIOkHttpClient;
import com.openai.core.MultipartField;
import com.openai.core.http.HttpResponse;
import com.openai.core.http.StreamResponse;
import com.openai.errors.BadRequestException;
import com.openai.errors.InternalServerException;
import com.openai.errors.NotFoundException;
import com.openai.errors.OpenAIServiceException;
import com.openai.errors.RateLimitException;
import com.openai.errors.UnauthorizedException;
import com.openai.helpers.ChatCompletionAccumulator;
import com.openai.helpers.ResponseAccumulator;
import com.openai.models.audio.speech.SpeechCreateParams;
import com.openai.models.audio.transcriptions.TranscriptionCreateParams;
import com.openai.models.chat.completions.ChatCompletionChunk;
import com.openai.models.chat.completions.ChatCompletionCreateParams;
import com.openai.models.completions.CompletionCreateParams;
import com.openai.models.embeddings.EmbeddingCreateParams;
import com.openai.models.images.ImageGenerateParams;
import com.openai.models.moderations.ModerationCreateParams;
import com.openai.models.responses.Response;
import com.openai.models.responses.ResponseCreateParams;
import com.openai.models.responses.ResponseFunctionToolCall;
import com.openai.models.responses.ResponseInputItem;
import com.openai.models.responses.ResponseStatus;
import com.openai.models.responses.ResponseStreamEvent;
import java.io.ByteArrayInputStream;
import java.io.InputStream;
import java.util.ArrayList;
import java.util.List;
import java.util.stream.Collectors;

/** OpenAI's library for Java, in front of a real LiteLLM, with nothing changed but base URL and key. */
public final class Client {
    private static final String MODEL = "gpt-5.4";
    private static final String QUESTION = "What is a trace?";
    private static final String TEXT = "A trace is the path of one request.";
    private static final int SOUND_SIZE = 4 + 256 * 64;

    /** A tool; the library makes its schema of the class. */
    @JsonClassDescription("The weather at a place.")
    public static class GetWeather {
        public String location;
    }

    // Base URL and key come from OPENAI_BASE_URL and OPENAI_API_KEY.
    private final OpenAIClient client = OpenAIOkHttpClient.builder().fromEnv().maxRetries(0).build();

    public static void main(String[] arguments) throws Exception {
        Client checks = new Client();
        checks.plainResponse();
        passed("responses");
        checks.streamedResponse();
        passed("responses stream");
        checks.responseTools();
        passed("responses tools");
        checks.keptResponse();
        passed("responses kept");
        checks.plainChat();
        passed("chat");
        checks.streamedChat();
        passed("chat stream");
        checks.chatTools();
        passed("chat tools");
        checks.completions();
        passed("completions");
        checks.embeddings();
        passed("embeddings");
        checks.moderations();
        passed("moderations");
        checks.images();
        passed("images");
        checks.speech();
        passed("speech");
        checks.transcriptions();
        passed("transcriptions");
        checks.models();
        passed("models");
        checks.failures();
        passed("errors");
        // The library's pool of threads would keep the process alive for a minute.
        System.exit(0);
    }

    private static void passed(String check) {
        System.out.println("{\"check\": \"" + check + "\"}");
    }

    private static void same(String what, Object got, Object wanted) {
        if (!wanted.equals(got)) {
            throw new IllegalStateException(what + " is " + got + ", not " + wanted);
        }
    }

    private static ResponseCreateParams.Builder asked() {
        return ResponseCreateParams.builder().model(MODEL).input(QUESTION);
    }

    private static String textOf(Response response) {
        return response.output().stream()
                .flatMap(item -> item.message().stream())
                .flatMap(message -> message.content().stream())
                .flatMap(content -> content.outputText().stream())
                .map(part -> part.text())
                .collect(Collectors.joining());
    }

    private void plainResponse() {
        Response answer = client.responses().create(asked().build());
        same("the text", textOf(answer), TEXT);
        same("the status", answer.status().orElseThrow(), ResponseStatus.COMPLETED);
        same("the number of tokens", answer.usage().orElseThrow().totalTokens(), 30L);
    }

    private void streamedResponse() {
        ResponseAccumulator whole = ResponseAccumulator.create();
        List<String> pieces = new ArrayList<>();
        try (StreamResponse<ResponseStreamEvent> events = client.responses().createStreaming(asked().build())) {
            events.stream()
                    .peek(whole::accumulate)
                    .flatMap(event -> event.outputTextDelta().stream())
                    .forEach(event -> pieces.add(event.delta()));
        }
        same("the text", String.join("", pieces), TEXT);
        same("streaming", pieces.size() > 1, true);
        same("the text at the end", textOf(whole.response()), TEXT);
    }

    private void responseTools() {
        Response answer = client.responses().create(asked().addTool(GetWeather.class).build());
        ResponseFunctionToolCall call = answer.output().get(answer.output().size() - 1).asFunctionCall();
        same("the argument", call.arguments(GetWeather.class).location, "Bern");
        ResponseInputItem result = ResponseInputItem.ofFunctionCallOutput(
                ResponseInputItem.FunctionCallOutput.builder().callId(call.callId()).output("21 degrees").build());
        Response told = client.responses().create(asked()
                .addTool(GetWeather.class)
                .previousResponseId(answer.id())
                .inputOfResponse(List.of(result))
                .build());
        same("the text", textOf(told), "The tool says: 21 degrees");
    }

    private void keptResponse() {
        String id = client.responses().create(asked().build()).id();
        same("the text", textOf(client.responses().retrieve(id)), TEXT);
        client.responses().delete(id);
        failing(NotFoundException.class, 404, () -> client.responses().retrieve(id));
    }

    private static ChatCompletionCreateParams.Builder chat() {
        return ChatCompletionCreateParams.builder().model(MODEL).addUserMessage(QUESTION);
    }

    private void plainChat() {
        var answer = client.chat().completions().create(chat().build());
        same("the text", answer.choices().get(0).message().content().orElseThrow(), TEXT);
        same("the number of tokens", answer.usage().orElseThrow().totalTokens(), 30L);
    }

    private void streamedChat() {
        ChatCompletionAccumulator whole = ChatCompletionAccumulator.create();
        long pieces;
        try (StreamResponse<ChatCompletionChunk> chunks = client.chat().completions().createStreaming(chat().build())) {
            pieces = chunks.stream().map(whole::accumulate).filter(chunk -> !chunk.choices().isEmpty()).toList().size();
        }
        same("the text", whole.chatCompletion().choices().get(0).message().content().orElseThrow(), TEXT);
        same("streaming", pieces > 2, true);
    }

    private void chatTools() {
        var answer = client.chat().completions().create(chat().addTool(GetWeather.class).build());
        var calls = answer.choices().get(0).message().toolCalls().orElseThrow();
        same("the argument", calls.get(0).asFunction().function().arguments(GetWeather.class).location, "Bern");
    }

    // Not streamed: LiteLLM leaves `text` out of the last pieces, and this library insists on it.
    private void completions() {
        CompletionCreateParams request =
                CompletionCreateParams.builder().model("gpt-3.5-turbo-instruct").prompt(QUESTION).build();
        same("the text", client.completions().create(request).choices().get(0).text(), TEXT);
    }

    private void embeddings() {
        var answer = client.embeddings().create(EmbeddingCreateParams.builder()
                .model("text-embedding-3-small")
                .inputOfArrayOfStrings(List.of("a", "b"))
                .build());
        same("the number of vectors", answer.data().size(), 2);
        same("the vector", answer.data().get(1).embedding(), List.of(0.25f, -0.5f));
    }

    private void moderations() {
        var answer = client.moderations().create(ModerationCreateParams.builder()
                .model("omni-moderation-latest")
                .inputOfStrings(List.of("hello", "kill them"))
                .build());
        same("what is flagged", answer.results().stream().map(one -> one.flagged()).toList(), List.of(false, true));
    }

    private void images() {
        var answer = client.images()
                .generate(ImageGenerateParams.builder().model("gpt-image-1").prompt("A trace").build());
        String picture = answer.data().orElseThrow().get(0).b64Json().orElseThrow();
        // The beginning of every PNG, in Base64.
        same("the picture", picture.startsWith("iVBORw0KGgo"), true);
    }

    private void speech() throws Exception {
        SpeechCreateParams request =
                SpeechCreateParams.builder().model("tts-1").voice("alloy").input(TEXT).build();
        try (HttpResponse answer = client.audio().speech().create(request)) {
            same("the number of bytes", answer.body().readAllBytes().length, SOUND_SIZE);
        }
    }

    // Not with whisper-1: of that model, LiteLLM asks for and hands on more than the request does.
    private void transcriptions() {
        MultipartField<InputStream> sound = MultipartField.<InputStream>builder()
                .value(new ByteArrayInputStream(new byte[300_000]))
                .filename("sound.mp3")
                .contentType("audio/mpeg")
                .build();
        var answer = client.audio()
                .transcriptions()
                .create(TranscriptionCreateParams.builder().model("gpt-4o-transcribe").file(sound).build());
        same("the text", answer.asTranscription().text(), "I heard 300000 bytes.");
    }

    private void models() {
        boolean found = client.models().list().autoPager().stream().anyMatch(model -> model.id().equals(MODEL));
        same("the model's presence", found, true);
    }

    private static void failing(Class<? extends OpenAIServiceException> kind, int status, Runnable call) {
        try {
            call.run();
        } catch (OpenAIServiceException error) {
            same("the class of the error", error.getClass(), kind);
            same("the status", error.statusCode(), status);
            same("the presence of a type", error.type().isPresent(), true);
            same("the length of the request id", error.headers().values("x-request-id").get(0).length(), 32);
            return;
        }
        throw new IllegalStateException("an answer instead of " + status);
    }

    private void failures() {
        refused(BadRequestException.class, 400, "nope");
        refused(InternalServerException.class, 502, "gpt-broken");
        refused(RateLimitException.class, 429, "gpt-busy");
        OpenAIClient stranger = client.withOptions(options -> options.apiKey("wrong"));
        failing(UnauthorizedException.class, 401, () -> stranger.responses().create(asked().build()));
    }

    private void refused(Class<? extends OpenAIServiceException> kind, int status, String model) {
        ResponseCreateParams request = asked().model(model).build();
        failing(kind, status, () -> client.responses().create(request));
        failing(kind, status, () -> client.responses().createStreaming(request).stream().count());
    }
}
