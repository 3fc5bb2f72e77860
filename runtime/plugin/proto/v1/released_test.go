package runtimev1_test

import (
	"fmt"
	"maps"
	"os"
	"slices"
	"testing"

	"github.com/shoenig/test/must"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protodesc"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"
	"google.golang.org/protobuf/types/descriptorpb"

	runtimev1 "github.com/bivouac/bivouac/runtime/plugin/proto/v1"
)

// Bivouac understands plugins of the last release, whose protocol is
// released.binpb: nothing that it had was removed, renamed or changed.
func TestProtocolUnderstandsReleasedPlugins(t *testing.T) {
	data, err := os.ReadFile("../released.binpb")
	must.NoError(t, err)
	var set descriptorpb.FileDescriptorSet
	must.NoError(t, proto.Unmarshal(data, &set))
	files, err := protodesc.NewFiles(&set)
	must.NoError(t, err)
	released, err := files.FindFileByPath(runtimev1.File_v1_runtime_proto.Path())
	must.NoError(t, err)
	must.SliceEmpty(t, breaks(released))
}

func TestBreaks(t *testing.T) {
	for name, test := range map[string]struct {
		// release changes today's protocol into one that was released.
		release func(*descriptorpb.FileDescriptorProto)
		want    []string
	}{
		"nothing changed": {release: func(*descriptorpb.FileDescriptorProto) {}},
		"a field was added": {
			release: func(f *descriptorpb.FileDescriptorProto) { f.MessageType[1].Field = f.MessageType[1].Field[:1] },
		},
		"a message was removed": {
			func(f *descriptorpb.FileDescriptorProto) {
				f.MessageType = append(f.MessageType, &descriptorpb.DescriptorProto{Name: new("Old")})
			},
			[]string{`bivouac.runtime.v1.Old: was "message", is ""`},
		},
		"a field was renamed": {
			func(f *descriptorpb.FileDescriptorProto) { f.MessageType[1].Field[0].Name = new("old") },
			[]string{`bivouac.runtime.v1.InfoResponse 1: was "optional string old", is "optional string name"`},
		},
		"a field became a list": {
			func(f *descriptorpb.FileDescriptorProto) {
				f.MessageType[1].Field[2].Label = descriptorpb.FieldDescriptorProto_LABEL_OPTIONAL.Enum()
			},
			[]string{`bivouac.runtime.v1.InfoResponse 3: was "optional string abilities", is "repeated string abilities"`},
		},
		"an enum value was removed": {
			func(f *descriptorpb.FileDescriptorProto) {
				f.EnumType[0].Value = append(f.EnumType[0].Value, &descriptorpb.EnumValueDescriptorProto{
					Name: new("STAGE_OLD"), Number: new(int32(9)),
				})
			},
			[]string{`bivouac.runtime.v1.Stage 9: was "STAGE_OLD", is ""`},
		},
		"a method no longer streams": {
			func(f *descriptorpb.FileDescriptorProto) { f.Service[0].Method[0].ServerStreaming = new(true) },
			[]string{`bivouac.runtime.v1.DriverService.Info: was "bivouac.runtime.v1.InfoRequest false bivouac.runtime.v1.InfoResponse true", ` +
				`is "bivouac.runtime.v1.InfoRequest false bivouac.runtime.v1.InfoResponse false"`},
		},
	} {
		t.Run(name, func(t *testing.T) {
			file := protodesc.ToFileDescriptorProto(runtimev1.File_v1_runtime_proto)
			test.release(file)
			released, err := protodesc.NewFile(file, protoregistry.GlobalFiles)
			must.NoError(t, err)
			must.Eq(t, test.want, breaks(released))
		})
	}
}

// breaks returns what today's protocol removed from a released one, or changed.
func breaks(released protoreflect.FileDescriptor) []string {
	was, is := declarations(released), declarations(runtimev1.File_v1_runtime_proto)
	var found []string
	for _, name := range slices.Sorted(maps.Keys(was)) {
		if was[name] != is[name] {
			found = append(found, fmt.Sprintf("%s: was %q, is %q", name, was[name], is[name]))
		}
	}
	return found
}

// declarations returns everything that a protocol declares, by its name or number.
func declarations(file protoreflect.FileDescriptor) map[string]string {
	all := map[string]string{}
	addEnums := func(enums protoreflect.EnumDescriptors) {
		for i := range enums.Len() {
			values := enums.Get(i).Values()
			for j := range values.Len() {
				all[fmt.Sprintf("%s %d", enums.Get(i).FullName(), values.Get(j).Number())] = string(values.Get(j).Name())
			}
		}
	}
	var addMessages func(protoreflect.MessageDescriptors)
	addMessages = func(messages protoreflect.MessageDescriptors) {
		for i := range messages.Len() {
			m := messages.Get(i)
			all[string(m.FullName())] = "message"
			for j := range m.Fields().Len() {
				f := m.Fields().Get(j)
				all[fmt.Sprintf("%s %d", m.FullName(), f.Number())] = field(f)
			}
			addMessages(m.Messages())
			addEnums(m.Enums())
		}
	}
	addMessages(file.Messages())
	addEnums(file.Enums())
	for i := range file.Services().Len() {
		methods := file.Services().Get(i).Methods()
		for j := range methods.Len() {
			m := methods.Get(j)
			all[string(m.FullName())] = fmt.Sprint(m.Input().FullName(), " ", m.IsStreamingClient(), " ", m.Output().FullName(), " ", m.IsStreamingServer())
		}
	}
	return all
}

func field(f protoreflect.FieldDescriptor) string {
	kind := f.Kind().String()
	switch {
	case f.Message() != nil:
		kind = string(f.Message().FullName())
	case f.Enum() != nil:
		kind = string(f.Enum().FullName())
	}
	declaration := fmt.Sprint(f.Cardinality(), " ", kind, " ", f.Name())
	if oneof := f.ContainingOneof(); oneof != nil {
		declaration += fmt.Sprint(" in ", oneof.Name())
	}
	return declaration
}
