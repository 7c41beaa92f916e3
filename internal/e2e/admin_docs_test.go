// This file runs the calls of the admin API that the documents show, by curl, and what
// is wrong with calls.

package e2e

import (
	"context"
	"encoding/json"
	"maps"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/gobwas/ws"
)

// apiSite is Caddy with a route of WebSockets and one of tunnels, and live clients of
// both.
type apiSite struct {
	*proxy
	upstreams [2]string
	client    *rawConn // the oldest
}

func startAPISite(t *testing.T) *apiSite {
	t.Helper()
	s := &apiSite{upstreams: [2]string{rawBackend(t, echoRaw), rawBackend(t, echoRaw)}}
	addr := freeAddr(t)
	s.proxy = startCaddy(t, "layer4 {\n"+addr+" {\n"+toAll(echoBackend(t, nil)+" {\n name tunnels\n}")+"}\n}",
		"websocket_proxy "+strings.Join(s.upstreams[:], " ")+" {\n name chat\n lb_policy round_robin\n drain_window 0\n}")
	s.client = rawDial(t, s.addr, "")
	s.client.send(t, ws.OpText, "hello")
	s.client.wantText(t, "hello")
	tunnel := dialTCP(t, addr)
	wantEcho(t, tunnel, "hello")
	for range 3 {
		go stayPolitely(rawDial(t, s.addr, ""))
	}
	return s
}

// stayPolitely owns a client that answers pings and a close frame. Its end ends it.
func stayPolitely(c *rawConn) {
	for {
		h, payload, err := c.receive()
		if err != nil {
			return
		}
		switch h.OpCode {
		case ws.OpPing:
			err = ws.WriteFrame(c, ws.MaskFrame(ws.NewPongFrame([]byte(payload))))
		case ws.OpClose:
			err = ws.WriteFrame(c, ws.MaskFrame(ws.NewCloseFrame([]byte(payload))))
		default:
		}
		if err != nil {
			return
		}
	}
}

// The fields of a connection that are always there.
const connectionFields = "age buffered_bytes bytes_in bytes_out client dial host id idle kind messages_in messages_out opened_at protocol replayed resumes route state upstream uri"

// documented are what calls must give, by method and path.
var documented = map[string]struct {
	status int
	fields string // of the object in the answer, in order
}{
	"GET /connections":               {http.StatusOK, "connections next"},
	"GET /connections/<id>":          {http.StatusOK, connectionFields},
	"DELETE /connections/<id>":       {http.StatusNoContent, ""},
	"DELETE /connections":            {http.StatusAccepted, "matched"},
	"POST /connections/<id>/migrate": {http.StatusAccepted, ""},
	"POST /connections/drain":        {http.StatusOK, "connections"},
	"DELETE /connections/drain":      {http.StatusNoContent, ""},
	"GET /connections/stats":         {http.StatusOK, "age_seconds by_kind by_route by_state by_upstream closed_by_reason total"},
	"GET /connections/upstreams":     {http.StatusOK, "connections dial draining fails healthy route upstream"},
}

// Every call of the documents works as it is printed.
func TestCallsOfDocuments(t *testing.T) {
	for _, file := range []string{"README.md", "docs/json.md"} {
		t.Run(file, func(t *testing.T) {
			s := startAPISite(t)
			missing := maps.Clone(documented)
			for _, call := range documentedCalls(t, file) {
				method, path := callOf(call)
				delete(missing, method+" "+path)
				s.check(t, call, method, path)
			}
			for call := range missing {
				t.Errorf("%s shows no %s", file, call)
			}
		})
	}
}

// documentedCalls are the calls of curl in a document, without comments.
func documentedCalls(t *testing.T, file string) (calls []string) {
	t.Helper()
	text, err := os.ReadFile("../../" + file)
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range regexp.MustCompile(`(?m)^curl .*localhost:2019.*$`).FindAllString(string(text), -1) {
		call, _, _ := strings.Cut(m, "  #")
		calls = append(calls, strings.TrimSpace(call))
	}
	return calls
}

// callOf returns the method and the path of a call.
func callOf(call string) (method, path string) {
	method = http.MethodGet
	if m := regexp.MustCompile(`-X (\w+)`).FindStringSubmatch(call); m != nil {
		method = m[1]
	}
	return method, regexp.MustCompile(`localhost:2019([^?' ]*)`).FindStringSubmatch(call)[1]
}

// check makes a call, with names and addresses of this site, and checks the answer.
func (s *apiSite) check(t *testing.T, call, method, path string) {
	t.Helper()
	want, known := documented[method+" "+path]
	if !known {
		t.Errorf("%s: there is no such call", call)
		return
	}
	id := s.list(t, "?kind=websocket&limit=1")[0].ID
	command := strings.NewReplacer("localhost:2019", s.admin, "<id>", id, "app1:8080", s.upstreams[0], "10.0.0.1:8080", s.upstreams[0]).Replace(call)
	command = strings.Replace(command, "curl ", `curl --silent --show-error --noproxy '*' --write-out '\n%{http_code}' `, 1)
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	out, err := exec.CommandContext(ctx, "sh", "-c", command).CombinedOutput()
	i := strings.LastIndexByte(string(out), '\n')
	if err != nil || i < 0 {
		t.Errorf("%s: %v: %s", command, err, out)
		return
	}
	body, status := strings.TrimSpace(string(out[:i])), string(out[i+1:])
	if status != strconv.Itoa(want.status) || (body == "") != (want.fields == "") {
		t.Errorf("%s: got %s %s, want %d", command, status, body, want.status)
		return
	}
	if got := fieldsOf(body); got != want.fields {
		t.Errorf("%s: got %s, want the fields %s", command, body, want.fields)
	}
	switch method + " " + path {
	case "GET /connections":
		var list struct{ Connections []json.RawMessage }
		_ = json.Unmarshal([]byte(body), &list)
		for _, c := range list.Connections {
			if got := fieldsOf(string(c)); got != connectionFields {
				t.Errorf("%s: got a connection %s, want its fields", command, c)
			}
		}
		if len(list.Connections) == 0 {
			t.Errorf("%s: got none, want some", command)
		}
	case "DELETE /connections":
		if body != `{"matched":0}` { // none is a day old
			t.Errorf("%s: got %s, want none", command, body)
		}
	case "DELETE /connections/<id>":
		query, _ := url.ParseQuery(regexp.MustCompile(`\?([^']*)`).FindStringSubmatch(call)[1])
		code, reason, _, err := s.client.receiveClose()
		if err != nil || strconv.Itoa(int(code)) != query.Get("code") || reason != query.Get("reason") {
			t.Errorf("%s: the client got %d %q, %v", command, code, reason, err)
		}
		s.client.sendClose(t, code, "")
		s.wait(t, command, "/connections/"+id, `"error":"no connection with id`)
	case "POST /connections/<id>/migrate":
		s.wait(t, command, "/connections/"+id, `"resumes":1`)
	case "POST /connections/drain":
		s.wait(t, command, "/connections/upstreams", `"draining":true,"connections":0`)
	case "DELETE /connections/drain":
		if _, body := s.request(t, http.MethodGet, "/connections/upstreams"); strings.Contains(string(body), `"draining":true`) {
			t.Errorf("%s: got %s, want none drained", command, body)
		}
	}
}

// wait waits until an answer of the API contains something.
func (s *apiSite) wait(t *testing.T, command, path, want string) {
	t.Helper()
	var body []byte
	if !eventually(20*time.Second, func() bool {
		_, body = s.request(t, http.MethodGet, path)
		return strings.Contains(string(body), want)
	}) {
		t.Errorf("%s: then %s has %s, want %s", command, path, body, want)
	}
}

// list returns a page of connections.
func (p *proxy) list(t testing.TB, query string) []connection {
	t.Helper()
	var page struct{ Connections []connection }
	p.call(t, http.MethodGet, "/connections"+query, &page)
	return page.Connections
}

// fieldsOf returns the names in a JSON object, or in the first one of an array.
func fieldsOf(body string) string {
	var object map[string]any
	if json.Unmarshal([]byte(body), &object) != nil {
		var array []map[string]any
		if json.Unmarshal([]byte(body), &array) != nil || len(array) == 0 {
			return ""
		}
		object = array[0]
	}
	return strings.Join(slices.Sorted(maps.Keys(object)), " ")
}

// What is wrong with a call is told as Caddy's API tells it, and changes nothing.
func TestWrongCalls(t *testing.T) {
	s := startAPISite(t)
	id := s.list(t, "?limit=1")[0].ID
	before := s.stats(t).Total
	for _, test := range []struct {
		method, target, body string
		status               int
		want                 string // in the error
	}{
		{"GET", "/connections/none", "", 404, `no connection with id "none"`},
		{"DELETE", "/connections/none", "", 404, `no connection with id "none"`},
		{"POST", "/connections/none/migrate", "", 404, `no connection with id "none"`},
		{"GET", "/connections?kind=telegraph", "", 400, `unknown kind "telegraph"`},
		{"GET", "/connections?state=ajar", "", 400, `unknown state "ajar"`},
		{"GET", "/connections?colour=red", "", 400, `unknown parameter "colour"`},
		{"GET", "/connections?min_age=old", "", 400, `min_age must be a duration: "old"`},
		{"GET", "/connections?limit=1001", "", 400, `limit must be a number from 1 to 1000: "1001"`},
		{"GET", "/connections?route=a&route=b", "", 400, "repeated parameter: route"},
		{"DELETE", "/connections", "", 400, "no filter"},
		{"DELETE", "/connections?window=0", "", 400, "no filter"},
		{"DELETE", "/connections?route=chat&window=soon", "", 400, `window must be a duration: "soon"`},
		{"DELETE", "/connections/" + id + "?code=1005", "", 400, `code must be a close code that may be sent: "1005"`},
		{"DELETE", "/connections/" + id + "?reason=" + strings.Repeat("x", 124), "", 400, "reason must be UTF-8 of at most 123 bytes"},
		{"POST", "/connections", "", 405, "method not allowed: POST"},
		{"PUT", "/connections/" + id, "", 405, "method not allowed: PUT"},
		{"GET", "/connections/" + id + "/migrate", "", 405, "method not allowed: GET"},
		{"DELETE", "/connections/stats", "", 405, "method not allowed: DELETE"},
		{"POST", "/connections/upstreams", "", 405, "method not allowed: POST"},
		{"GET", "/connections/drain", "", 405, "method not allowed: GET"},
		{"POST", "/connections/drain", "", 400, "reading body"},
		{"POST", "/connections/drain", "{}", 400, "upstream is missing"},
		{"POST", "/connections/drain", `{"upstreams":"a"}`, 400, "unknown field"},
		{"POST", "/connections/drain", `{"upstream":"a:1"} x`, 400, "surplus data"},
		{"POST", "/connections/drain", `{"upstream":"a:1"}`, 404, `no upstream "a:1"`},
		{"POST", "/connections/drain", `{"upstream":"` + s.upstreams[0] + `","route":"other"}`, 404, "other"},
		{"DELETE", "/connections/drain", "", 400, "upstream is missing"},
		{"DELETE", "/connections/drain?upstream=a:1", "", 404, `no upstream "a:1"`},
	} {
		req, err := http.NewRequestWithContext(t.Context(), test.method, "http://"+s.admin+test.target, strings.NewReader(test.body))
		if err != nil {
			t.Fatal(err)
		}
		req.Close = true
		res, err := http.DefaultClient.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		var told struct{ Error string }
		err = json.NewDecoder(res.Body).Decode(&told)
		res.Body.Close()
		if err != nil || res.StatusCode != test.status || !strings.Contains(told.Error, test.want) || (res.Header.Get("Allow") != "") != (test.status == 405) {
			t.Errorf("%s %s %s: got %d %q, Allow %q, %v; want %d %q", test.method, test.target, test.body, res.StatusCode, told.Error, res.Header["Allow"], err, test.status, test.want)
		}
	}
	if got := s.stats(t); got.Total != before || got.ByState["open"] != before {
		t.Errorf("got %+v, want all %d open", got, before)
	}
	tunnel := s.list(t, "?kind=passthrough")[0].ID
	if status, body := s.request(t, http.MethodPost, "/connections/"+tunnel+"/migrate"); status != http.StatusConflict || !strings.Contains(string(body), `"error"`) {
		t.Errorf("moving a tunnel: got %d %s, want 409 and why", status, body)
	}
}
