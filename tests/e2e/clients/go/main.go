// OpenAI's library for Go, in front of a real LiteLLM, with nothing changed but base URL and key.
package main

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"slices"
	"strings"

	"github.com/openai/openai-go/v3"
	"github.com/openai/openai-go/v3/option"
	"github.com/openai/openai-go/v3/responses"
	"github.com/openai/openai-go/v3/shared"
)

const (
	model     = "gpt-5.4"
	question  = "What is a trace?"
	text      = "A trace is the path of one request."
	soundSize = 4 + 256*64
)

var parameters = map[string]any{
	"type":                 "object",
	"properties":           map[string]any{"location": map[string]any{"type": "string"}},
	"required":             []string{"location"},
	"additionalProperties": false,
}

func main() {
	ctx := context.Background()
	// Base URL and key come from OPENAI_BASE_URL and OPENAI_API_KEY.
	client := openai.NewClient(option.WithMaxRetries(0))
	for _, check := range []struct {
		name string
		play func(context.Context, openai.Client) error
	}{
		{"responses", plainResponse},
		{"responses stream", streamedResponse},
		{"responses tools", responseTools},
		{"responses kept", keptResponse},
		{"chat", plainChat},
		{"chat stream", streamedChat},
		{"chat tools", chatTools},
		{"completions", completions},
		{"embeddings", embeddings},
		{"moderations", moderations},
		{"images", images},
		{"speech", speech},
		{"transcriptions", transcriptions},
		{"models", models},
		{"errors", failures},
	} {
		if err := check.play(ctx, client); err != nil {
			fmt.Fprintf(os.Stderr, "%s: %v\n", check.name, err)
			os.Exit(1)
		}
		line, _ := json.Marshal(map[string]string{"check": check.name})
		fmt.Println(string(line))
	}
}

// same tells whether a check found what it should.
func same[T comparable](what string, got, want T) error {
	if got != want {
		return fmt.Errorf("%s is %v, not %v", what, got, want)
	}
	return nil
}

func location(arguments string) error {
	var found struct{ Location string }
	if err := json.Unmarshal([]byte(arguments), &found); err != nil {
		return err
	}
	return same("the argument", found.Location, "Bern")
}

func asked() responses.ResponseNewParams {
	return responses.ResponseNewParams{
		Model: model,
		Input: responses.ResponseNewParamsInputUnion{OfString: openai.String(question)},
	}
}

func plainResponse(ctx context.Context, client openai.Client) error {
	answer, err := client.Responses.New(ctx, asked())
	if err != nil {
		return err
	}
	return errors.Join(
		same("the text", answer.OutputText(), text),
		same("the status", answer.Status, responses.ResponseStatusCompleted),
		same("the number of tokens", answer.Usage.TotalTokens, 30),
	)
}

func streamedResponse(ctx context.Context, client openai.Client) error {
	stream := client.Responses.NewStreaming(ctx, asked())
	defer stream.Close()
	var got strings.Builder
	var pieces, number int64
	var last responses.ResponseStreamEventUnion
	for stream.Next() {
		last = stream.Current()
		if err := same("the sequence number", last.SequenceNumber, number); err != nil {
			return err
		}
		number++
		if last.Type == "response.output_text.delta" {
			got.WriteString(last.Delta)
			pieces++
		}
	}
	return errors.Join(
		stream.Err(),
		same("the text", got.String(), text),
		same("streaming", pieces > 1, true),
		same("the last event", last.Type, "response.completed"),
		same("its text", last.Response.OutputText(), text),
	)
}

func responseTools(ctx context.Context, client openai.Client) error {
	request := asked()
	request.Tools = []responses.ToolUnionParam{{OfFunction: &responses.FunctionToolParam{
		Name: "get_weather", Parameters: parameters, Strict: openai.Bool(true),
	}}}
	answer, err := client.Responses.New(ctx, request)
	if err != nil {
		return err
	}
	call := answer.Output[len(answer.Output)-1].AsFunctionCall()
	if err := location(call.Arguments); err != nil {
		return err
	}
	request.PreviousResponseID = openai.String(answer.ID)
	result := responses.ResponseInputItemParamOfFunctionCallOutput("21 degrees")
	result.OfFunctionCallOutput.CallID = openai.String(call.CallID)
	request.Input = responses.ResponseNewParamsInputUnion{OfInputItemList: responses.ResponseInputParam{result}}
	answer, err = client.Responses.New(ctx, request)
	if err != nil {
		return err
	}
	return same("the text", answer.OutputText(), "The tool says: 21 degrees")
}

func keptResponse(ctx context.Context, client openai.Client) error {
	answer, err := client.Responses.New(ctx, asked())
	if err != nil {
		return err
	}
	kept, err := client.Responses.Get(ctx, answer.ID, responses.ResponseGetParams{})
	if err != nil {
		return err
	}
	if err := client.Responses.Delete(ctx, answer.ID); err != nil {
		return err
	}
	_, err = client.Responses.Get(ctx, answer.ID, responses.ResponseGetParams{})
	return errors.Join(same("the text", kept.OutputText(), text), failedWith(err, http.StatusNotFound))
}

func chat() openai.ChatCompletionNewParams {
	return openai.ChatCompletionNewParams{
		Model: model, Messages: []openai.ChatCompletionMessageParamUnion{openai.UserMessage(question)},
	}
}

func plainChat(ctx context.Context, client openai.Client) error {
	answer, err := client.Chat.Completions.New(ctx, chat())
	if err != nil {
		return err
	}
	return errors.Join(
		same("the text", answer.Choices[0].Message.Content, text),
		same("the number of tokens", answer.Usage.TotalTokens, 30),
	)
}

func streamedChat(ctx context.Context, client openai.Client) error {
	request := chat()
	request.StreamOptions = openai.ChatCompletionStreamOptionsParam{IncludeUsage: openai.Bool(true)}
	stream := client.Chat.Completions.NewStreaming(ctx, request)
	defer stream.Close()
	var whole openai.ChatCompletionAccumulator
	pieces := 0
	for stream.Next() {
		if !whole.AddChunk(stream.Current()) {
			return errors.New("a piece does not belong to its stream")
		}
		pieces++
	}
	if err := stream.Err(); err != nil {
		return err
	}
	return errors.Join(
		same("the text", whole.Choices[0].Message.Content, text),
		same("the number of tokens", whole.Usage.TotalTokens, 30),
		same("streaming", pieces > 2, true),
	)
}

func chatTools(ctx context.Context, client openai.Client) error {
	request := chat()
	request.Tools = []openai.ChatCompletionToolUnionParam{
		openai.ChatCompletionFunctionTool(shared.FunctionDefinitionParam{Name: "get_weather", Parameters: parameters}),
	}
	answer, err := client.Chat.Completions.New(ctx, request)
	if err != nil {
		return err
	}
	call := answer.Choices[0].Message.ToolCalls[0]
	if err := location(call.Function.Arguments); err != nil {
		return err
	}
	request.Messages = append(
		request.Messages, answer.Choices[0].Message.ToParam(), openai.ToolMessage("21 degrees", call.ID),
	)
	answer, err = client.Chat.Completions.New(ctx, request)
	if err != nil {
		return err
	}
	return same("the text", answer.Choices[0].Message.Content, "The tool says: 21 degrees")
}

func completions(ctx context.Context, client openai.Client) error {
	request := openai.CompletionNewParams{
		Model:  openai.CompletionNewParamsModelGPT3_5TurboInstruct,
		Prompt: openai.CompletionNewParamsPromptUnion{OfString: openai.String(question)},
	}
	answer, err := client.Completions.New(ctx, request)
	if err != nil {
		return err
	}
	stream := client.Completions.NewStreaming(ctx, request)
	defer stream.Close()
	var got strings.Builder
	for stream.Next() {
		for _, choice := range stream.Current().Choices {
			got.WriteString(choice.Text)
		}
	}
	return errors.Join(
		stream.Err(), same("the text", answer.Choices[0].Text, text), same("the streamed text", got.String(), text),
	)
}

func embeddings(ctx context.Context, client openai.Client) error {
	answer, err := client.Embeddings.New(ctx, openai.EmbeddingNewParams{
		Model: openai.EmbeddingModelTextEmbedding3Small,
		Input: openai.EmbeddingNewParamsInputUnion{OfArrayOfStrings: []string{"a", "b"}},
	})
	if err != nil {
		return err
	}
	if err := same("the number of vectors", len(answer.Data), 2); err != nil {
		return err
	}
	return same("the vector's rightness", slices.Equal(answer.Data[1].Embedding, []float64{0.25, -0.5}), true)
}

func moderations(ctx context.Context, client openai.Client) error {
	answer, err := client.Moderations.New(ctx, openai.ModerationNewParams{
		Model: openai.ModerationModelOmniModerationLatest,
		Input: openai.ModerationNewParamsInputUnion{OfStringArray: []string{"hello", "kill them"}},
	})
	if err != nil {
		return err
	}
	return errors.Join(
		same("the first", answer.Results[0].Flagged, false), same("the second", answer.Results[1].Flagged, true),
	)
}

func images(ctx context.Context, client openai.Client) error {
	answer, err := client.Images.Generate(ctx, openai.ImageGenerateParams{
		Model: openai.ImageModelGPTImage1, Prompt: "A trace",
	})
	if err != nil {
		return err
	}
	png, err := base64.StdEncoding.DecodeString(answer.Data[0].B64JSON)
	if err != nil {
		return err
	}
	return same("the kind of file", http.DetectContentType(png), "image/png")
}

func speech(ctx context.Context, client openai.Client) error {
	answer, err := client.Audio.Speech.New(ctx, openai.AudioSpeechNewParams{
		Model: openai.SpeechModelTTS1, Input: text,
		Voice: openai.AudioSpeechNewParamsVoiceUnion{OfString: openai.String("alloy")},
	})
	if err != nil {
		return err
	}
	defer answer.Body.Close()
	sound, err := io.ReadAll(answer.Body)
	return errors.Join(
		err,
		same("the number of bytes", len(sound), soundSize),
		same("the kind", strings.HasPrefix(answer.Header.Get("Content-Type"), "audio/"), true),
	)
}

func transcriptions(ctx context.Context, client openai.Client) error {
	sound := bytes.Repeat([]byte{7}, 300_000)
	answer, err := client.Audio.Transcriptions.New(ctx, openai.AudioTranscriptionNewParams{
		Model: openai.AudioModelWhisper1, File: openai.File(bytes.NewReader(sound), "sound.mp3", "audio/mpeg"),
	})
	if err != nil {
		return err
	}
	return same("the text", answer.Text, "I heard 300000 bytes.")
}

func models(ctx context.Context, client openai.Client) error {
	found := false
	pages := client.Models.ListAutoPaging(ctx)
	for pages.Next() {
		found = found || pages.Current().ID == model
	}
	return errors.Join(pages.Err(), same("the model's presence", found, true))
}

// failedWith tells whether the library made its own error of the answer, with what people quote and look at.
func failedWith(err error, status int) error {
	var failure *openai.Error
	if !errors.As(err, &failure) {
		return fmt.Errorf("no error of the library: %w", err)
	}
	return errors.Join(
		same("the status", failure.StatusCode, status),
		same("the presence of a message", failure.Message != "", true),
		same("the presence of a type", failure.Type != "", true),
		same("the length of the request id", len(failure.Response.Header.Get("X-Request-Id")), 32),
	)
}

func failures(ctx context.Context, client openai.Client) error {
	for name, status := range map[string]int{"nope": 400, "gpt-broken": 502, "gpt-busy": 429} {
		request := asked()
		request.Model = name
		_, err := client.Responses.New(ctx, request)
		stream := client.Responses.NewStreaming(ctx, request)
		for stream.Next() {
		}
		if err := errors.Join(failedWith(err, status), failedWith(stream.Err(), status)); err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
	}
	_, err := client.Responses.New(ctx, asked(), option.WithAPIKey("wrong"))
	return failedWith(err, http.StatusUnauthorized)
}
