// Runs templates of Go as Ollama does: each line of standard input is a template with the
// system prompt and messages it is given, each line of output the text, as JSON.
package main

import (
	"encoding/json"
	"io"
	"log"
	"os"
	"strings"
	"text/template"
)

// Message has the two fields of Ollama's api.Message that templates of ours use.
type Message struct {
	Role    string
	Content string
}

func main() {
	input := json.NewDecoder(os.Stdin)
	output := json.NewEncoder(os.Stdout)
	for {
		var asked struct {
			Template string
			System   string
			Messages []*Message
		}
		if err := input.Decode(&asked); err == io.EOF {
			return
		} else if err != nil {
			log.Fatal(err)
		}
		// A field that is not given is an error in Ollama's templates too.
		parsed, err := template.New("").Option("missingkey=error").Parse(asked.Template)
		if err != nil {
			log.Fatal(err)
		}
		var text strings.Builder
		data := map[string]any{"System": asked.System, "Messages": asked.Messages}
		if err := parsed.Execute(&text, data); err != nil {
			log.Fatal(err)
		}
		if err := output.Encode(text.String()); err != nil {
			log.Fatal(err)
		}
	}
}
