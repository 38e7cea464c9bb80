//! async-openai, in front of a real LiteLLM, with nothing changed but base URL and key.

use std::{error::Error, fmt::Debug, process::ExitCode};

use async_openai::{
    config::OpenAIConfig,
    error::OpenAIError,
    middleware::ReqwestService,
    types::{
        audio::{AudioInput, CreateSpeechRequestArgs, CreateTranscriptionRequestArgs, SpeechModel, Voice},
        chat::{
            ChatCompletionMessageToolCalls, ChatCompletionRequestUserMessage, ChatCompletionTool, ChatCompletionTools,
            CreateChatCompletionRequest, CreateChatCompletionRequestArgs, FunctionObjectArgs,
        },
        completions::CreateCompletionRequestArgs,
        embeddings::CreateEmbeddingRequestArgs,
        images::{CreateImageRequestArgs, Image, ImageModel},
        moderations::CreateModerationRequestArgs,
        responses::{
            CreateResponse, CreateResponseArgs, FunctionCallOutput, FunctionCallOutputItemParam, FunctionTool,
            InputItem, InputParam, Item, OutputItem, ResponseStreamEvent, Status, Tool,
        },
        InputSource,
    },
    Client,
};
use futures::StreamExt;
use serde_json::{json, Value};

const MODEL: &str = "gpt-5.4";
const QUESTION: &str = "What is a trace?";
const TEXT: &str = "A trace is the path of one request.";
const SOUND_SIZE: usize = 4 + 256 * 64;

type Checked = Result<(), Box<dyn Error>>;
type OpenAI = Client<OpenAIConfig>;

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    match play().await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}

async fn play() -> Checked {
    // Base URL and key come from OPENAI_BASE_URL and OPENAI_API_KEY.
    let client = Client::new();
    plain_response(&client).await.and_then(|()| passed("responses"))?;
    streamed_response(&client)
        .await
        .and_then(|()| passed("responses stream"))?;
    response_tools(&client).await.and_then(|()| passed("responses tools"))?;
    kept_response(&client).await.and_then(|()| passed("responses kept"))?;
    plain_chat(&client).await.and_then(|()| passed("chat"))?;
    streamed_chat(&client).await.and_then(|()| passed("chat stream"))?;
    chat_tools(&client).await.and_then(|()| passed("chat tools"))?;
    completions(&client).await.and_then(|()| passed("completions"))?;
    embeddings(&client).await.and_then(|()| passed("embeddings"))?;
    moderations(&client).await.and_then(|()| passed("moderations"))?;
    images(&client).await.and_then(|()| passed("images"))?;
    speech(&client).await.and_then(|()| passed("speech"))?;
    transcriptions(&client).await.and_then(|()| passed("transcriptions"))?;
    models(&client).await.and_then(|()| passed("models"))?;
    failures(&client).await.and_then(|()| passed("errors"))
}

fn passed(check: &str) -> Checked {
    println!("{}", json!({ "check": check }));
    Ok(())
}

fn same<T: PartialEq + Debug>(what: &str, got: T, want: T) -> Checked {
    if got == want {
        return Ok(());
    }
    Err(format!("{what} is {got:?}, not {want:?}").into())
}

fn parameters() -> Value {
    json!({
        "type": "object",
        "properties": {"location": {"type": "string"}},
        "required": ["location"],
        "additionalProperties": false,
    })
}

fn location(arguments: &str) -> Checked {
    same(
        "the arguments",
        serde_json::from_str::<Value>(arguments)?,
        json!({"location": "Bern"}),
    )
}

fn asked() -> Result<CreateResponse, OpenAIError> {
    CreateResponseArgs::default().model(MODEL).input(QUESTION).build()
}

async fn plain_response(client: &OpenAI) -> Checked {
    let answer = client.responses().create(asked()?).await?;
    same("the text", answer.output_text().as_deref(), Some(TEXT))?;
    same("the status", answer.status, Status::Completed)?;
    same(
        "the number of tokens",
        answer.usage.map(|usage| usage.total_tokens),
        Some(30),
    )
}

async fn streamed_response(client: &OpenAI) -> Checked {
    let mut stream = client.responses().create_stream(asked()?).await?;
    let (mut got, mut pieces, mut whole) = (String::new(), 0, None);
    while let Some(event) = stream.next().await {
        match event? {
            ResponseStreamEvent::ResponseOutputTextDelta(event) => {
                got.push_str(&event.delta);
                pieces += 1;
            }
            ResponseStreamEvent::ResponseCompleted(event) => whole = event.response.output_text(),
            _ => {}
        }
    }
    same("the text", got.as_str(), TEXT)?;
    same("streaming", pieces > 1, true)?;
    same("the text at the end", whole.as_deref(), Some(TEXT))
}

async fn response_tools(client: &OpenAI) -> Checked {
    let mut request = asked()?;
    request.tools = Some(vec![Tool::Function(FunctionTool {
        name: "get_weather".into(),
        parameters: Some(parameters()),
        strict: Some(true),
        ..Default::default()
    })]);
    let answer = client.responses().create(request.clone()).await?;
    let Some(OutputItem::FunctionCall(call)) = answer.output.last() else {
        return Err("the tool was not called".into());
    };
    location(&call.arguments)?;
    let result = FunctionCallOutputItemParam {
        call_id: Some(call.call_id.clone()),
        output: FunctionCallOutput::Text("21 degrees".into()),
        id: None,
        status: None,
        name: None,
        namespace: None,
        caller: None,
    };
    request.previous_response_id = Some(answer.id);
    request.input = InputParam::Items(vec![InputItem::from(Item::from(result))]);
    let answer = client.responses().create(request).await?;
    same(
        "the text",
        answer.output_text().as_deref(),
        Some("The tool says: 21 degrees"),
    )
}

async fn kept_response(client: &OpenAI) -> Checked {
    let answer = client.responses().create(asked()?).await?;
    let kept = client.responses().retrieve(&answer.id).await?;
    same("the text", kept.output_text().as_deref(), Some(TEXT))?;
    same(
        "the deletion",
        client.responses().delete(&answer.id).await?.deleted,
        true,
    )?;
    failed_with(client.responses().retrieve(&answer.id).await, 404)
}

fn chat() -> Result<CreateChatCompletionRequest, OpenAIError> {
    CreateChatCompletionRequestArgs::default()
        .model(MODEL)
        .messages([ChatCompletionRequestUserMessage::from(QUESTION).into()])
        .build()
}

async fn plain_chat(client: &OpenAI) -> Checked {
    let answer = client.chat().create(chat()?).await?;
    same("the text", answer.choices[0].message.content.as_deref(), Some(TEXT))?;
    same(
        "the number of tokens",
        answer.usage.map(|usage| usage.total_tokens),
        Some(30),
    )
}

async fn streamed_chat(client: &OpenAI) -> Checked {
    let mut stream = client.chat().create_stream(chat()?).await?;
    let (mut got, mut pieces) = (String::new(), 0);
    while let Some(piece) = stream.next().await {
        for choice in piece?.choices {
            got.push_str(choice.delta.content.as_deref().unwrap_or_default());
            pieces += 1;
        }
    }
    same("the text", got.as_str(), TEXT)?;
    same("streaming", pieces > 2, true)
}

async fn chat_tools(client: &OpenAI) -> Checked {
    let function = FunctionObjectArgs::default()
        .name("get_weather")
        .parameters(parameters())
        .build()?;
    let mut request = chat()?;
    request.tools = Some(vec![ChatCompletionTools::Function(ChatCompletionTool { function })]);
    let answer = client.chat().create(request).await?;
    match answer.choices[0].message.tool_calls.as_deref() {
        Some([ChatCompletionMessageToolCalls::Function(call)]) => location(&call.function.arguments),
        other => Err(format!("the tool was not called: {other:?}").into()),
    }
}

// Not streamed: LiteLLM leaves `text` out of the last pieces, and this library insists on it.
async fn completions(client: &OpenAI) -> Checked {
    let request = CreateCompletionRequestArgs::default()
        .model("gpt-3.5-turbo-instruct")
        .prompt(QUESTION)
        .build()?;
    let answer = client.completions().create(request).await?;
    same("the text", answer.choices[0].text.as_str(), TEXT)
}

async fn embeddings(client: &OpenAI) -> Checked {
    let request = CreateEmbeddingRequestArgs::default()
        .model("text-embedding-3-small")
        .input(["a", "b"])
        .build()?;
    let answer = client.embeddings().create(request.clone()).await?;
    let vectors: Vec<_> = answer.data.into_iter().map(|entry| entry.embedding).collect();
    same("the vectors", vectors, vec![vec![0.25, -0.5]; 2])
}

async fn moderations(client: &OpenAI) -> Checked {
    let request = CreateModerationRequestArgs::default()
        .model("omni-moderation-latest")
        .input(["hello", "kill them"])
        .build()?;
    let answer = client.moderations().create(request).await?;
    let flagged: Vec<_> = answer.results.iter().map(|result| result.flagged).collect();
    same("what is flagged", flagged, vec![false, true])
}

async fn images(client: &OpenAI) -> Checked {
    let request = CreateImageRequestArgs::default()
        .model(ImageModel::Other("gpt-image-1".into()))
        .prompt("A trace")
        .build()?;
    let answer = client.images().generate(request).await?;
    match answer.data[0].as_ref() {
        // The beginning of every PNG, in Base64.
        Image::B64Json { b64_json, .. } => same("the picture", b64_json.starts_with("iVBORw0KGgo"), true),
        Image::Url { url, .. } => Err(format!("an address instead of a picture: {url}").into()),
    }
}

async fn speech(client: &OpenAI) -> Checked {
    let request = CreateSpeechRequestArgs::default()
        .model(SpeechModel::Other("tts-1".into()))
        .voice(Voice::Alloy)
        .input(TEXT)
        .build()?;
    let answer = client.audio().speech().create(request).await?;
    same("the number of bytes", answer.bytes.len(), SOUND_SIZE)
}

async fn transcriptions(client: &OpenAI) -> Checked {
    let sound = InputSource::VecU8 {
        filename: "sound.mp3".into(),
        vec: vec![7; 300_000],
    };
    let request = CreateTranscriptionRequestArgs::default()
        .model("whisper-1")
        .file(AudioInput { source: sound })
        .build()?;
    let answer = client.audio().transcription().create(request).await?;
    same("the text", answer.text.as_str(), "I heard 300000 bytes.")
}

async fn models(client: &OpenAI) -> Checked {
    let found = client.models().list().await?;
    same(
        "the model's presence",
        found.data.iter().any(|model| model.id == MODEL),
        true,
    )
}

/// Whether the library made its own error of the answer, with what people look at.
fn failed_with<T>(result: Result<T, OpenAIError>, status: u16) -> Checked {
    match result {
        Ok(_) => Err(format!("an answer instead of {status}").into()),
        Err(OpenAIError::ApiError(error)) => {
            same("the status", error.status_code.as_u16(), status)?;
            same("the presence of a message", error.api_error.message.is_empty(), false)?;
            // The library does not read the body of a 5xx.
            same("the presence of a type", error.api_error.r#type.is_some(), status < 500)
        }
        Err(error) => Err(format!("no error of the library: {error:?}").into()),
    }
}

async fn failures(client: &OpenAI) -> Checked {
    // This transport is the library's own without its retries.
    let once = client.clone().with_http_service(ReqwestService::default());
    for (model, status) in [("nope", 400), ("gpt-broken", 502), ("gpt-busy", 429)] {
        let mut request = asked()?;
        request.model = Some(model.into());
        failed_with(once.responses().create(request.clone()).await, status)?;
        let streamed = match once.responses().create_stream(request).await {
            Ok(mut stream) => stream
                .next()
                .await
                .unwrap_or(Err(OpenAIError::InvalidArgument("no event".into()))),
            Err(error) => Err(error),
        };
        failed_with(streamed, status)?;
    }
    let stranger = Client::with_config(OpenAIConfig::default().with_api_key("wrong"));
    failed_with(stranger.responses().create(asked()?).await, 401)
}
