// This file runs curl.

package e2e

import (
	"context"
	"os/exec"
	"slices"
	"strings"
	"testing"
)

// curl asks for a WebSocket with the headers of an upgrade, gets the right answer,
// and then the backend's frames as they are.
func TestCurl(t *testing.T) {
	const (
		upgraded = "HTTP/1.1 101 Switching Protocols"
		greeting = "\x81\x05hello"
		farewell = "\x88\x05\x03\xe8bye" // 1000
		killed   = -1                    // exit status
	)
	short := []string{
		"--include", "--http1.1", "-H", "Connection: Upgrade", "-H", "Upgrade: websocket",
		"-H", "Sec-WebSocket-Version: 13", "-H", "Sec-WebSocket-Key: " + testKey,
	}
	// As a tutorial has it, whose Host is of another port; it leaves the key to the reader.
	tutorial := func(key string) []string {
		return []string{
			"--include", "--header", "Connection: Upgrade", "--header", "Upgrade: websocket",
			"--header", "Host: 127.0.0.1:10020", "--header", "Sec-WebSocket-Key: " + key,
			"--header", "Sec-WebSocket-Version: 13",
		}
	}
	for _, test := range []struct {
		name   string
		args   []string
		query  string
		until  string // curl is ended when it has written that; "": it ends by itself
		status int    // exit status
		line   string // status line
		frames string
		code   uint16 // that the backend gets
		reason string
	}{
		{"ended by curl", short, "", greeting, killed, upgraded, greeting, 1001, "client_gone"},
		{"ended by the backend", short, "&code=1000&reason=bye", "", 0, upgraded, greeting + farewell, 1000, "backend_closed"},
		{"tutorial", tutorial(testKey), "", greeting, killed, upgraded, greeting, 1001, "client_gone"},
		{"tutorial without a key", tutorial("your-key-here"), "", "", 0, "HTTP/1.1 400 Bad Request", "", 0, ""},
	} {
		for _, host := range hosts {
			t.Run(test.name+"/"+host.name, func(t *testing.T) {
				backend := host.start(t)
				p := startCaddy(t, "", "websocket_proxy "+backend)
				v := (&stay{proxy: p, backend: backend}).arrive(t)
				out, status := curl(v.ctx, t, test.until, append(test.args, "http://"+p.addr+"/greet?case="+v.key+test.query)...)
				if status != test.status {
					t.Errorf("exit status: got %d, want %d", status, test.status)
				}
				head, frames, _ := strings.Cut(out, "\r\n\r\n")
				lines := strings.Split(head, "\r\n")
				if lines[0] != test.line {
					t.Errorf("status line: got %q, want %q", lines[0], test.line)
				}
				if frames != test.frames {
					t.Errorf("what follows the header: got %q, want %q", frames, test.frames)
				}
				if test.line != upgraded {
					v.ended()
					return
				}
				for _, want := range []string{"Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo="} {
					if !slices.ContainsFunc(lines, func(line string) bool { return strings.EqualFold(line, want) }) {
						t.Errorf("header: got %q, want %q among it", lines, want)
					}
				}
				if r := v.report(); r.Code != test.code || r.Error != "" {
					t.Errorf("close, as the backend sees it: got %d %s, want %d", r.Code, r.Error, test.code)
				}
				v.ended(test.reason)
			})
		}
	}
}

// curl returns what curl writes, and its exit status. It is killed, which is status -1,
// when it has written until, unless that is empty.
func curl(ctx context.Context, t testing.TB, until string, args ...string) (out string, status int) {
	t.Helper()
	cmd := exec.CommandContext(ctx, tool(t, "curl"), append([]string{"--silent", "--no-buffer", "--noproxy", "*"}, args...)...)
	pipe, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	for buf := make([]byte, 4096); err == nil; {
		var n int
		n, err = pipe.Read(buf)
		out += string(buf[:n])
		if until != "" && strings.Contains(out, until) {
			_ = cmd.Process.Kill()
		}
	}
	_ = cmd.Wait() // its status says it
	return out, cmd.ProcessState.ExitCode()
}
